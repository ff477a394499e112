"""The pages of a cache of keys and values, on a CPU: attention to them, and writing them. The Python face of
kernels/cpu/pages.cpp; the twins are in `kernels.reference`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from carpool.kernels import native
from carpool.kernels.native import Batch, pointer


def serves(key_cache: Tensor, value_cache: Tensor, *rows: Tensor) -> bool:
    """Whether these caches [P, S, N, D] and rows [T, N, D] of tokens go with each other here: all on a CPU and of one
    dtype, the caches without gaps and the rows with none within a token.
    """
    return (
        native.library is not None
        and key_cache.is_cpu
        and key_cache.shape == value_cache.shape
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
        and all(x.is_cpu and x.dtype == key_cache.dtype for x in (value_cache, *rows))
        and all(x.stride()[1:] == (key_cache.shape[3], 1) for x in rows)
    )


def serves_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether `paged_attention` can take these."""
    return serves(key_cache, value_cache, query) and native.serves(
        query, key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    )


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
) -> Tensor:
    """As its twin, for what `serves_attention`. Leading pages that neighbouring sequences have in common are laid
    out for the inner loops once.
    """
    if not serves_attention(query, key_cache, value_cache):
        raise ValueError(
            f"{query.dtype} {list(query.shape)} does not fit {key_cache.dtype} {list(key_cache.shape)}"
        )
    batch, _tables = batch_of(len(query), key_cache, pages, cu_seqlens, key_lengths)
    rows = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    return native.attend(query, *rows, batch, scale=scale, causal=True, window=window, softcap=softcap)


def batch_of(
    queries: int, cache: Tensor, pages: Tensor, cu_seqlens: Tensor, key_lengths: Tensor
) -> tuple[Batch, tuple[Tensor, ...]]:
    """Sequences whose keys lie in the pages of a cache, and the tables that this points to, to be kept meanwhile.

    Raises ValueError where they are not in there, or their queries are not so many.
    """
    bounds, lengths, own = (x.int().contiguous() for x in (cu_seqlens, key_lengths, pages))
    count = len(bounds) - 1
    fits = (
        bounds.ndim == 1 and count >= 0 and lengths.shape == (count,) and own.ndim == 2 and len(own) == count
    )
    if not fits or not cache.shape[1]:
        raise ValueError(
            f"{count} sequences, and pages {list(own.shape)} of {cache.shape[1]} tokens, {list(lengths.shape)} lengths"
        )
    tables = bounds, own, lengths
    batch = Batch(*(x.data_ptr() for x in tables), count, own.shape[1], cache.shape[1])
    assert native.library is not None
    fault = native.library.carpool_paged_fault(
        ctypes.byref(batch), ctypes.c_int64(queries), ctypes.c_int64(len(cache))
    )
    if fault >= 0:
        raise ValueError(
            f"sequence {fault} of {count}: pages {own[fault].tolist()} of {len(cache)} do not hold its "
            f"{int(lengths[fault])} tokens, or {bounds[fault : fault + 2].tolist()} of {queries} are not the last"
        )
    return batch, tables


def kv_write(keys: Tensor, values: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """As its twin, for what `serves`."""
    token = key_cache.shape[2:]
    fits = keys.shape == values.shape == (len(slots), *token) and slots.dtype == torch.int64
    if not fits or not serves(key_cache, value_cache, keys, values):
        raise ValueError(
            f"{keys.dtype} {list(keys.shape)}, {list(values.shape)} at {slots.dtype} {list(slots.shape)} do not fit "
            f"{key_cache.dtype} {list(key_cache.shape)}"
        )
    assert native.library is not None
    element, own = keys.element_size(), slots.contiguous()
    sizes = (ctypes.c_int64(x) for x in (keys.stride(0) * element, values.stride(0) * element))
    native.library.carpool_kv_write(
        *(pointer(keys), pointer(values), *sizes, pointer(own)),
        *(ctypes.c_int64(len(keys)), ctypes.c_int64(token.numel() * element)),
        *(pointer(key_cache), pointer(value_cache), ctypes.c_int64(key_cache.shape[0] * key_cache.shape[1])),
    )
