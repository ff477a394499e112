"""What stands on logits: classes of rows, and weights of words."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from carpool.kernels.reference.segments import segment_ids, shared_value

IDENTITY, SIGMOID, SOFTMAX = range(3)  # kinds of `activate_rows`


def activate_rows(logits: Tensor, kinds: Tensor, mean: float = 0.0, sigma: float = 1.0) -> Tensor:
    """logits [R, C], int8 kinds [R] → float32 [R, C]: (logit - mean) / sigma; its sigmoid; or the row's softmax."""
    plain = (logits.float() - mean) / sigma
    shared = shared_value(kinds)
    if shared is not None:
        return plain if shared == IDENTITY else (plain.sigmoid() if shared == SIGMOID else plain.softmax(1))
    kind = kinds[:, None]
    activated = torch.where(kind == SIGMOID, torch.sigmoid(plain), torch.softmax(plain, dim=1))
    return torch.where(kind == IDENTITY, plain, activated)


def sparse_rows(logits: Tensor, cu_seqlens: Tensor, *, sums: bool = False, twice: bool = False) -> Tensor:
    """SPLADE: logits [T, V], cu_seqlens int32 [B+1] → float32 [B, V], over each sequence's tokens the largest
    log(1 + relu(logit)), or their sum; `twice` takes the logarithm twice. A sequence of no tokens gives zeros.
    """

    def squash(weights: Tensor) -> Tensor:
        weights = weights.log1p()
        return weights.log1p() if twice else weights

    pooled = logits.new_zeros(len(cu_seqlens) - 1, logits.shape[1], dtype=torch.float32)
    if logits.device.type == "cpu":  # a slice a text, since looking at the bounds costs nothing
        for row, (start, end) in zip(pooled, pairwise(cu_seqlens.tolist()), strict=True):
            if start < end:
                weights = torch.relu(logits[start:end].float())
                row.copy_(squash(weights).sum(0) if sums else weights.amax(0))
        return pooled if sums else squash(pooled)  # of a maximum, the logarithm can be taken last
    weights = squash(torch.relu(logits.float()))
    index = segment_ids(cu_seqlens, len(logits))[:, None].expand(-1, logits.shape[1])
    return pooled.scatter_reduce_(0, index, weights, "sum" if sums else "amax")
