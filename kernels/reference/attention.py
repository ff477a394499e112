"""Attention within sequences of a packed row, and to the pages of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from carpool.kernels.reference.scores import attend, batched, by_distance, mask_of, rows_at_once, spans


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each sequence of a packed row.

    query [T, N, D], key and value [T, N_kv, D] with N a multiple of N_kv; returns [T, N, D] in query's dtype.
    `runs` are (length, count): that many neighbouring sequences of that length; they add up to T.
    `window`: a token sees those less than `window` away (both sides, or the left one if causal).
    `softcap`: scores become softcap * tanh(score / softcap) (Gemma 2).
    `bias` [N, 2M - 1], M at least the longest length: what is then added to head n's score of a key that stands d
    tokens behind its query is bias[n, M - 1 + d] (T5, MPNet, ALiBi).
    `sinks` [N]: the score of one more key, which takes its share of the weights and has no value (GPT-OSS).
    Scores, softmax and sums are float32: for 16-bit inputs this is both more exact and, on a CPU, faster.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    holds_scores = softcap is not None or bias is not None or sinks is not None
    out = torch.empty_like(query, dtype=torch.float32)
    for rows, length, count in spans(runs):
        q, k, v = (batched(x[rows], count) for x in (query, key, value))
        if heads != kv_heads:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        step = rows_at_once(length, count * heads) if holds_scores else length
        results = out[rows].view(count, length, heads, -1).transpose(1, 2)
        for first in range(0, length, step):
            last = min(first + step, length)
            mask = mask_of(first, last, length, causal, window, query.device)
            added = None if bias is None else by_distance(bias.float(), first, last, length)
            results[:, :, first:last] = attend(q[:, :, first:last], k, v, mask, scale, softcap, added, sinks)
    return out.to(query.dtype)


def attention_to_first(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: int,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within one sequence, of all its tokens to its first `seen`; else as `varlen_attention`.

    query [L, N, D], key and value [L, N_kv, D]; returns [L, N, D] in query's dtype. A token that sees none of them gets
    nothing: zeros.
    """
    length, heads, kv_heads = len(query), query.shape[1], key.shape[1]
    q, k, v = (batched(x, 1) for x in (query, key[:seen], value[:seen]))
    if heads != kv_heads:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    mask = mask_of(0, length, length, causal, window, query.device)
    mask = None if mask is None else mask[:, :seen]
    added = None if bias is None else by_distance(bias.float(), 0, length, length)[..., :seen]
    out = attend(q, k, v, mask, scale, softcap, added, sinks)[0].transpose(0, 1)
    if mask is not None:
        out = torch.where(mask.any(1)[:, None, None], out, 0)
    return out.to(query.dtype)


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
    """`varlen_attention` of sequences that only the device knows: cu_seqlens int32 [B+1], the most tokens of one.

    seen int32 [B]: all tokens of a sequence look at its first so many only (`attention_to_first`).
    """
    lengths: list[int] = cu_seqlens.diff().tolist()
    assert max(lengths, default=0) <= longest
    kind: dict[str, Any] = {
        "scale": scale, "causal": causal, "window": window, "softcap": softcap, "bias": bias, "sinks": sinks
    }  # fmt: skip
    runs = [(length, len(list(run))) for length, run in groupby(lengths) if length]
    out = varlen_attention(query, key, value, runs, **kind)
    if seen is not None:
        starts: list[int] = cu_seqlens.tolist()
        for start, length, first in zip(starts, lengths, seen.tolist(), strict=False):
            if first < length:
                own = slice(start, start + length)
                out[own] = attention_to_first(query[own], key[own], value[own], first, **kind) if first else 0
    return out


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
    """Causal attention of each sequence's last tokens to all that it has so far, whose keys and values are in pages.

    query [T, N, D], of sequences with cu_seqlens int32 [B+1], the longest of `longest`; caches [P, S, N_kv, D], int32
    pages [B, M] of each sequence in order; int32 key_lengths [B], the queries' own tokens counted; returns [T, N, D] in
    query's dtype. `window`, `softcap` and `sinks` as in `varlen_attention`.
    """
    out = torch.empty_like(query)
    bounds, size = cu_seqlens.tolist(), key_cache.shape[1]
    group = query.shape[1] // key_cache.shape[2]
    for own, (start, end), length in zip(pages, pairwise(bounds), key_lengths.tolist(), strict=True):
        assert end - start <= min(longest, length)
        if start == end:
            continue
        place = torch.arange(length, device=query.device)
        page = own[place // size].long()
        keys, values = (
            cache[page, place % size].repeat_interleave(group, dim=1) for cache in (key_cache, value_cache)
        )
        mask = mask_of(length - (end - start), length, length, True, window, query.device)
        q, k, v = (batched(x, 1) for x in (query[start:end], keys, values))
        out[start:end] = attend(q, k, v, mask, scale, softcap, None, sinks)[0].transpose(0, 1)
    return out
