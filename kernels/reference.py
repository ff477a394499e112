"""Every operation on packed rows in plain torch: the specification, the CPU path, and the tests' oracle.

Shapes: `T` tokens in the batch, `B` sequences, `N` heads, `D` head or output dimension, `H` hidden.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length two batched matrix products and a softmax beat scaled_dot_product_attention on a CPU
# (its blocking has a fixed cost a head); measured in docs/log.md.
_SHORT = 96
# Scores held at once where they are held at all (16 MiB of float32): longer texts are done a block of rows at a time.
_SCORES = 1 << 22


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
    for rows, length, count in _spans(runs):
        q, k, v = (_batch(x[rows], count) for x in (query, key, value))
        if heads != kv_heads:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        step = _rows_at_once(length, count * heads) if holds_scores else length
        results = out[rows].view(count, length, heads, -1).transpose(1, 2)
        for first in range(0, length, step):
            last = min(first + step, length)
            mask = _mask(first, last, length, causal, window, query.device)
            added = None if bias is None else _by_distance(bias.float(), first, last, length)
            results[:, :, first:last] = _attend(q[:, :, first:last], k, v, mask, scale, softcap, added, sinks)
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
    q, k, v = (_batch(x, 1) for x in (query, key[:seen], value[:seen]))
    if heads != kv_heads:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    mask = _mask(0, length, length, causal, window, query.device)
    mask = None if mask is None else mask[:, :seen]
    added = None if bias is None else _by_distance(bias.float(), 0, length, length)[..., :seen]
    out = _attend(q, k, v, mask, scale, softcap, added, sinks)[0].transpose(0, 1)
    if mask is not None:
        out = torch.where(mask.any(1)[:, None, None], out, 0)
    return out.to(query.dtype)


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    rows_of: Tensor,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
) -> Tensor:
    """Attention of contents and relative positions within each sequence of a packed row (DeBERTa).

    query, key and value [T, N, D]; position_keys and position_queries [P, N, D], either may be None; returns [T, N, D]
    in query's dtype. With r the row of those tables for a key's distance from its query, a score is
    scale * (query·key + query·position_keys[r] + key·position_queries[r]).
    `rows_of` int64 [2M - 1] on the CPU, nowhere rising, M at least the longest length: r = rows_of[M - 1 + d] for a
    key that stands d tokens behind its query.
    """
    heads = query.shape[1]
    out = torch.empty_like(query, dtype=torch.float32)
    keys, queries = (
        None if x is None else x.float().transpose(0, 1) for x in (position_keys, position_queries)
    )
    for rows, length, count in _spans(runs):
        q, k, v = (_batch(x[rows], count) for x in (query, key, value))
        # Of the tables only what this length can reach: for short texts that is a small part.
        middle = len(rows_of) // 2
        low, high = int(rows_of[middle + length - 1]), int(rows_of[middle - length + 1]) + 1
        reach = (rows_of - low)[None].to(query.device)
        # [count, N, L, high - low]
        by_key = None if queries is None else k @ queries[:, low:high].transpose(1, 2)
        step = _rows_at_once(length, count * heads)
        results = out[rows].view(count, length, heads, -1).transpose(1, 2)
        for first in range(0, length, step):
            last = min(first + step, length)
            q_rows = q[:, :, first:last]
            index = _by_distance(reach, first, last, length).expand(count, heads, -1, -1)
            scores = q_rows @ k.transpose(2, 3)  # [count, N, rows, L], as the index
            if keys is not None:
                scores = scores + (q_rows @ keys[:, low:high].transpose(1, 2)).gather(3, index)
            if by_key is not None:
                scores = scores + by_key.gather(3, index.transpose(2, 3)).transpose(2, 3)
            results[:, :, first:last] = torch.softmax(scores * scale, dim=-1) @ v
    return out.to(query.dtype)


def _spans(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, int, int]]:
    """Where in the row each run lies, its length and its count."""
    start = 0
    for length, count in runs:
        yield slice(start, start + length * count), length, count
        start += length * count


def _batch(rows: Tensor, count: int) -> Tensor:
    """[count * L, N, D] → float32 [count, N, L, D]."""
    return rows.float().view(count, -1, rows.shape[1], rows.shape[2]).transpose(1, 2)


def _rows_at_once(length: int, matrices: int) -> int:
    """How many rows of that many matrices of scores [L, L] to compute at a time."""
    return max(1, _SCORES // (matrices * length))


def _attend(
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


def _by_distance(values: Tensor, first: int, last: int, length: int) -> Tensor:
    """values [N, 2M - 1] by how far a key stands behind its query → [N, rows, L] for the queries first to last."""
    middle = values.shape[1] // 2
    if values.shape[1] % 2 == 0 or middle < length - 1:
        raise ValueError(f"{values.shape[1]} distances do not cover a text of {length} tokens")
    return values.unfold(1, length, 1)[:, middle - last + 1 : middle - first + 1].flip(1)


def _mask(
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


def segment_ids(cu_seqlens: Tensor) -> Tensor:
    """int64 [T]: which sequence each token belongs to. cu_seqlens int [B+1]."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)


def pool_cls(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first row of each sequence: [T, H] → float32 [B, H]."""
    return hidden[cu_seqlens[:-1].long()].float()


def pool_last(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last row of each sequence: [T, H] → float32 [B, H]."""
    return hidden[cu_seqlens[1:].long() - 1].float()


def pool_sum(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's rows: [T, H] → float32 [B, H]."""
    sums = hidden.new_zeros((len(cu_seqlens) - 1, hidden.shape[1]), dtype=torch.float32)
    return sums.index_add_(0, segment_ids(cu_seqlens), hidden.float())


def pool_mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's rows, summed in float32: [T, H] → float32 [B, H]."""
    return pool_sum(hidden, cu_seqlens) / cu_seqlens.diff()[:, None]


def pool_mean_sqrt_len(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's rows over the root of its length: [T, H] → float32 [B, H]."""
    return pool_sum(hidden, cu_seqlens) / cu_seqlens.diff()[:, None].sqrt()


def pool_weighted_mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's rows, the i-th (from 1) weighted by i: [T, H] → float32 [B, H]."""
    owner = segment_ids(cu_seqlens)
    weight = torch.arange(1, len(owner) + 1, device=hidden.device) - cu_seqlens[:-1].long()[owner]
    lengths = cu_seqlens.diff().float()
    return pool_sum(hidden.float() * weight[:, None], cu_seqlens) / (lengths * (lengths + 1) / 2)[:, None]


def pool_max(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The largest of each component over each sequence: [T, H] → float32 [B, H]."""
    top = hidden.new_full((len(cu_seqlens) - 1, hidden.shape[1]), float("-inf"), dtype=torch.float32)
    index = segment_ids(cu_seqlens)[:, None].expand(-1, hidden.shape[1])
    return top.scatter_reduce_(0, index, hidden.float(), "amax")


def cut_and_normalize(vectors: Tensor, widths: Tensor, normalize: Tensor) -> Tensor:
    """Matryoshka: row i keeps its first widths[i] components (the rest become 0), then gets unit length if asked.

    vectors float32 [B, D], widths int64 [B], normalize bool [B] → float32 [B, D]. L2 with eps 1e-12.
    """
    if int(widths.min()) < vectors.shape[1]:
        column = torch.arange(vectors.shape[1], device=vectors.device)
        vectors = vectors.masked_fill(column[None, :] >= widths[:, None], 0.0)
    length = vectors.norm(dim=1).clamp_min(1e-12)
    return vectors / torch.where(normalize, length, torch.ones_like(length))[:, None]
