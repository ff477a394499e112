"""Attention on a CUDA device (kernels/cuda/attention.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import cuda_table, launch
from carpool.kernels.cuda_ops.arguments import bounds_of, caches_of, element_of, flat
from carpool.kernels.launch import LaunchError

_FAR = 1 << 30  # tokens: farther than any sequence is long


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """See `kernels.reference.packed_attention`. All three may be views of a fused row, without gaps in a head."""
    count = bounds_of(cu_seqlens)
    for name, rows in (("key", key), ("value", value)):
        if len(rows) != len(query):
            raise LaunchError(f"{name} has {len(rows)} tokens, query has {len(query)}")
    if bias is not None:
        if bias.ndim != 2 or len(bias) != query.shape[1] or bias.shape[1] % 2 == 0:
            raise LaunchError(f"bias must be [{query.shape[1]}, 2M - 1], got {tuple(bias.shape)}")
        if bias.shape[1] < 2 * longest - 1:
            raise LaunchError(f"{bias.shape[1]} distances do not cover a text of {longest} tokens")
    if seen is not None:
        flat(count, seen=seen)
    return _attention(
        query, key, value, cu_seqlens, None, None, seen, bias, sinks,
        scale=scale, causal=causal, window=window, softcap=softcap, page_size=1,
    )  # fmt: skip


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pages: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `kernels.reference.paged_attention`."""
    count = bounds_of(cu_seqlens)
    caches_of(key_cache, value_cache)
    flat(count, key_lengths=key_lengths)
    if pages.ndim != 2 or len(pages) != count or not pages.is_contiguous():
        raise LaunchError(f"pages must be [{count}, M], got {tuple(pages.shape)}")
    return _attention(
        query, key_cache.flatten(0, 1), value_cache.flatten(0, 1), cu_seqlens, key_lengths, pages, None, None, sinks,
        scale=scale, causal=True, window=window, softcap=softcap, page_size=key_cache.shape[1],
    )  # fmt: skip


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor | None,
    pages: Tensor | None,
    seen: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    page_size: int,
) -> Tensor:
    """query [T, N, D], key and value [., N_kv, D] → [T, N, D]. The grid follows from T and B, which the host knows."""
    tokens, heads, size = query.shape
    element, vector = element_of("query", query), 16 // query.element_size()
    width = next((width for width in cuda_table.ATTENTION if size <= width), None)
    if width is None or size % vector:
        raise LaunchError(f"a head must be whole 16 bytes and at most 256 columns wide, got {size}")
    for name, rows in (("query", query), ("key", key), ("value", value)):
        whole = all(
            n == 1 or step % vector == 0 for n, step in zip(rows.shape[:2], rows.stride()[:2], strict=True)
        )
        if not whole or rows.stride(2) != 1 or rows.data_ptr() % 16:
            raise LaunchError(
                f"{name}: heads must be whole 16 bytes, aligned to them, without gaps in a head"
            )
        if rows.dtype != query.dtype or rows.shape[2] != size:
            raise LaunchError(
                f"{name} {tuple(rows.shape)} {rows.dtype} does not fit {size} columns of {query.dtype}"
            )
    if key.shape != value.shape:
        raise LaunchError(f"key {tuple(key.shape)} and value {tuple(value.shape)} are not alike")
    if not key.shape[1] or heads % key.shape[1]:
        raise LaunchError(f"{heads} heads do not share out {key.shape[1]} of keys")
    if window is not None and window < 1:
        raise LaunchError(f"a window must be at least 1, got {window}")
    if sinks is not None:
        flat(heads, sinks=sinks)
    out = torch.empty((tokens, heads, size), dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    reach = _FAR if window is None else min(window - 1, _FAR)
    grid = (tokens // cuda_table.ATTENTION[width] + len(cu_seqlens) - 1, heads)
    launch.run(
        "attention", (element, str(width)), grid,
        query, key, value, out, cu_seqlens, key_lengths, pages, seen,
        None if bias is None else bias.float().contiguous(), None if sinks is None else sinks.float(),
        len(cu_seqlens) - 1, heads // key.shape[1], size,
        0 if pages is None else pages.shape[1], page_size, 0 if bias is None else bias.shape[1],
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        reach, 0 if causal else reach, scale, softcap or 0.0,
    )  # fmt: skip
    return out
