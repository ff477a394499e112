"""Pooling methods by name: a packed batch's hidden states to one row a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from carpool.engine.poolers.pooler import Reads
from carpool.engine.side_files import PoolingMode
from carpool.kernels import launch, ops, reference

METHODS: Mapping[PoolingMode, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": reference.pool_cls,
    "last": reference.pool_last,
    "mean": reference.pool_mean,
    "max": reference.pool_max,
    "mean_sqrt_len": reference.pool_mean_sqrt_len,
    "weighted_mean": reference.pool_weighted_mean,
}
FUSED: Mapping[PoolingMode, int] = {"cls": reference.CLS, "last": reference.LAST, "mean": reference.MEAN}

READ: Mapping[PoolingMode, Reads] = {"cls": "first", "last": "last"}  # others read all tokens


def pool(mode: PoolingMode, hidden: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """hidden [T, H], cu_seqlens int32 [B+1], the most tokens of a sequence → float32 [B, H]."""
    if mode not in FUSED or not launch.backend.serves(hidden.device):
        return METHODS[mode](hidden, cu_seqlens)
    each = torch.full((len(cu_seqlens) - 1,), FUSED[mode], dtype=torch.int8, device=hidden.device)
    whole = torch.full_like(each, hidden.shape[1], dtype=torch.int32)
    no = torch.zeros_like(each, dtype=torch.bool)
    return ops.pool_rows(hidden, cu_seqlens, each, whole, no, longest=longest)[0]
