"""Every operation on packed rows in plain torch: the specification, the CPU path, and the tests' oracle.

Shapes: `T` tokens in the batch, `B` sequences, `N` heads, `D` head or output dimension, `H` hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length two batched matrix products and a softmax beat scaled_dot_product_attention on a CPU
# (its blocking has a fixed cost a head); measured in docs/log.md.
_SHORT = 96


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
) -> Tensor:
    """Attention within each sequence of a packed row.

    query [T, N, D], key and value [T, N_kv, D] with N a multiple of N_kv; returns [T, N, D] in query's dtype.
    `runs` are (length, count): that many neighbouring sequences of that length; they add up to T.
    `window`: a token sees those less than `window` away (both sides, or the left one if causal).
    `softcap`: scores become softcap * tanh(score / softcap) (Gemma 2).
    Scores, softmax and sums are float32: for 16-bit inputs this is both more exact and, on a CPU, faster.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    out = torch.empty_like(query, dtype=torch.float32)
    start = 0
    for length, count in runs:
        rows = slice(start, start + length * count)
        start = rows.stop
        # [count, N, length, D]
        q, k, v = (
            x[rows].float().view(count, length, x.shape[1], x.shape[2]).transpose(1, 2)
            for x in (query, key, value)
        )
        if heads != kv_heads:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        mask = _mask(length, causal, window, query.device)
        out[rows] = _attend(q, k, v, mask, scale, softcap).transpose(1, 2).reshape(-1, heads, query.shape[2])
    return out.to(query.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """q, k, v [count, N, L, D] float32; mask [L, L] is True where a query (row) sees a key (column)."""
    if softcap is None and (mask is not None or q.shape[2] > _SHORT):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def _mask(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """bool [L, L], or None when every token sees every token."""
    if not causal and (window is None or window >= length):
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
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
