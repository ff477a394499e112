"""Attention of contents and relative positions (DeBERTa)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from carpool.kernels.reference.scores import batched, by_distance, rows_at_once, spans


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    rows_of: Tensor,
    on_host: Sequence[int] | None = None,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
) -> Tensor:
    """Attention of contents and relative positions within each sequence of a packed row (DeBERTa).

    query, key and value [T, N, D]; position_keys and position_queries [P, N, D], either may be None; returns [T, N, D]
    in query's dtype. With r the row of those tables for a key's distance from its query, a score is
    scale * (query·key + query·position_keys[r] + key·position_queries[r]).
    `rows_of` int64 [2M - 1], nowhere rising, M at least the longest length: r = rows_of[M - 1 + d] for a
    key that stands d tokens behind its query. `on_host`: the same where the host need not wait for it.
    """
    heads = query.shape[1]
    row = rows_of.tolist() if on_host is None else on_host
    out = torch.empty_like(query, dtype=torch.float32)
    keys, queries = (
        None if x is None else x.float().transpose(0, 1) for x in (position_keys, position_queries)
    )
    for rows, length, count in spans(runs):
        q, k, v = (batched(x[rows], count) for x in (query, key, value))
        # Of the tables only what this length can reach: for short texts that is a small part.
        middle = len(rows_of) // 2
        low, high = row[middle + length - 1], row[middle - length + 1] + 1
        reach = (rows_of - low)[None]
        # [count, N, L, high - low]
        by_key = None if queries is None else k @ queries[:, low:high].transpose(1, 2)
        step = rows_at_once(length, count * heads)
        results = out[rows].view(count, length, heads, -1).transpose(1, 2)
        for first in range(0, length, step):
            last = min(first + step, length)
            q_rows = q[:, :, first:last]
            index = by_distance(reach, first, last, length).expand(count, heads, -1, -1)
            scores = q_rows @ k.transpose(2, 3)  # [count, N, rows, L], as the index
            if keys is not None:
                scores = scores + (q_rows @ keys[:, low:high].transpose(1, 2)).gather(3, index)
            if by_key is not None:
                scores = scores + by_key.gather(3, index.transpose(2, 3)).transpose(2, 3)
            results[:, :, first:last] = torch.softmax(scores * scale, dim=-1) @ v
    return out.to(query.dtype)
