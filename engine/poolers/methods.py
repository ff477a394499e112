"""Pooling methods by name: hidden [T, H] and cu_seqlens [B+1] to float32 [B, H]."""

from collections.abc import Callable, Mapping

from torch import Tensor

from carpool.engine.side_files import PoolingMode
from carpool.kernels import reference

Method = Callable[[Tensor, Tensor], Tensor]

METHODS: Mapping[PoolingMode, Method] = {
    "cls": reference.pool_cls,
    "last": reference.pool_last,
    "mean": reference.pool_mean,
    "max": reference.pool_max,
    "mean_sqrt_len": reference.pool_mean_sqrt_len,
    "weighted_mean": reference.pool_weighted_mean,
}
