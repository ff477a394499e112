"""Scores of queries with keys, and what becomes of them: attention's arithmetic, for sequences of equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length two batched matrix products and a softmax beat scaled_dot_product_attention on a CPU
# (its blocking has a fixed cost a head); measured in docs/log.md.
_SHORT = 96
# Scores held at once where they are held at all (16 MiB of float32): longer texts are done a block of rows at a time.
_SCORES = 1 << 22


def spans(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, int, int]]:
    """Where in the row each run lies, its length and its count."""
    start = 0
    for length, count in runs:
        yield slice(start, start + length * count), length, count
        start += length * count


def batched(rows: Tensor, count: int) -> Tensor:
    """[count * L, N, D] → float32 [count, N, L, D]."""
    return rows.float().view(count, -1, rows.shape[1], rows.shape[2]).transpose(1, 2)


def rows_at_once(length: int, matrices: int) -> int:
    """How many rows of that many matrices of scores [L, L] to compute at a time."""
    return max(1, _SCORES // (matrices * length))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """q [count, N, rows, D], k and v [count, N, L, D] float32 → [count, N, rows, D].

    mask bool [rows, L] is True where a query sees a key; bias [N, rows, L]; sinks [N].
    """
    plain = softcap is None and bias is None and sinks is None
    if plain and (mask is not None or q.shape[2] > _SHORT):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.matmul(torch.softmax(torch.cat([scores, sink], -1), dim=-1)[..., :-1], v)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def by_distance(values: Tensor, first: int, last: int, length: int) -> Tensor:
    """values [N, 2M - 1] by how far a key stands behind its query → [N, rows, L] for the queries first to last."""
    middle = values.shape[1] // 2
    if values.shape[1] % 2 == 0 or middle < length - 1:
        raise ValueError(f"{values.shape[1]} distances do not cover a text of {length} tokens")
    return values.unfold(1, length, 1)[:, middle - last + 1 : middle - first + 1].flip(1)


def mask_of(
    first: int, last: int, length: int, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """bool [rows, L] for the queries first to last, or None when every token sees every token."""
    if not causal and (window is None or window >= length):
        return None
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(length, device=device)
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & (distance.abs() < window)
    return mask
