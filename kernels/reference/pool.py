"""Rows of sequences pooled: one vector a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels.reference.outputs import Output, finish_rows
from carpool.kernels.reference.segments import segment_ids, shared_value

CLS, LAST, MEAN = range(3)  # modes of `pool_rows`


def pool_cls(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first row of each sequence: [T, H] → float32 [B, H]."""
    return hidden[cu_seqlens[:-1].long()].float()


def pool_last(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last row of each sequence: [T, H] → float32 [B, H]."""
    return hidden[cu_seqlens[1:].long() - 1].float()


def pool_sum(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's rows: [T, H] → float32 [B, H]."""
    sums = hidden.new_zeros((len(cu_seqlens) - 1, hidden.shape[1]), dtype=torch.float32)
    return sums.index_add_(0, segment_ids(cu_seqlens, len(hidden)), hidden.float())


def pool_mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's rows, summed in float32: [T, H] → float32 [B, H]."""
    return pool_sum(hidden, cu_seqlens) / cu_seqlens.diff()[:, None]


def pool_mean_sqrt_len(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's rows over the root of its length: [T, H] → float32 [B, H]."""
    return pool_sum(hidden, cu_seqlens) / cu_seqlens.diff()[:, None].sqrt()


def pool_weighted_mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's rows, the i-th (from 1) weighted by i: [T, H] → float32 [B, H]."""
    owner = segment_ids(cu_seqlens, len(hidden))
    weight = torch.arange(1, len(owner) + 1, device=hidden.device) - cu_seqlens[:-1].long()[owner]
    lengths = cu_seqlens.diff().float()
    return pool_sum(hidden.float() * weight[:, None], cu_seqlens) / (lengths * (lengths + 1) / 2)[:, None]


def pool_max(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The largest of each component over each sequence: [T, H] → float32 [B, H]."""
    top = hidden.new_full((len(cu_seqlens) - 1, hidden.shape[1]), float("-inf"), dtype=torch.float32)
    index = segment_ids(cu_seqlens, len(hidden))[:, None].expand(-1, hidden.shape[1])
    return top.scatter_reduce_(0, index, hidden.float(), "amax")


def pool_rows(
    hidden: Tensor,
    cu_seqlens: Tensor,
    modes: Tensor,
    widths: Tensor,
    normalize: Tensor,
    output: Output = "float32",
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sequence's first row, last row or mean, cut, normalised and cast, as its own `modes`, `widths` and
    `normalize` say.

    hidden [T, H], cu_seqlens int32 [B+1]; int8 modes, int32 widths (0 to H) and bool normalize [B] → rows and float32
    scales [B], as `finish_rows` makes them. A sequence of no tokens gives zeros. `longest`: the most tokens of a
    sequence, if known; how a device shares out the work may depend on it, the result does not.
    """
    lengths = cu_seqlens.diff().long()
    mode = shared_value(modes)
    if mode is not None and int(lengths.min()) > 0:
        pooled = (pool_cls, pool_last, pool_mean)[mode](hidden, cu_seqlens)
    else:
        pooled = pool_sum(hidden, cu_seqlens) / lengths.clamp_min(1)[:, None]
        for mode, places in ((CLS, cu_seqlens[:-1].long()), (LAST, cu_seqlens[1:].long() - 1)):
            chosen = (modes == mode) & (lengths > 0)
            if len(hidden):
                rows = hidden[places.clamp(0, len(hidden) - 1)].float()
                pooled = torch.where(chosen[:, None], rows, pooled)
    return finish_rows(pooled, widths, normalize, output)
