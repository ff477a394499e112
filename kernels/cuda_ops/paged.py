"""Keys and values into the pages of a cache and out of them, on a CUDA device (kernels/cuda/paged.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import launch
from carpool.kernels.cuda_ops.arguments import a_thread_each, bounds_of, caches_of, flat
from carpool.kernels.launch import LaunchError


def kv_write(keys: Tensor, values: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """See `kernels.reference.kv_write`."""
    units = caches_of(key_cache, value_cache)
    for name, packed in (("keys", keys), ("values", values)):
        if packed.shape[1:] != key_cache.shape[2:] or packed.dtype != key_cache.dtype:
            raise LaunchError(f"{name} {tuple(packed.shape)} do not fit caches {tuple(key_cache.shape)}")
        if not packed.is_contiguous() or len(packed) != len(slots):
            raise LaunchError(f"{name} must be [{len(slots)}, N, D] without gaps")
    flat(len(slots), slots=slots)
    if len(slots):
        capacity = key_cache.shape[0] * key_cache.shape[1]
        grid = a_thread_each("kv_write", len(slots) * units)
        launch.run(
            "kv_write", (), grid, keys, values, slots, key_cache, value_cache, len(slots), capacity, units
        )


def kv_gather(
    key_cache: Tensor, value_cache: Tensor, pages: Tensor, cu_seqlens: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.kv_gather`."""
    units = caches_of(key_cache, value_cache)
    count = bounds_of(cu_seqlens)
    if pages.ndim != 2 or len(pages) != count or not pages.is_contiguous():
        raise LaunchError(f"pages must be [{count}, M], got {tuple(pages.shape)}")
    keys, values = (
        torch.empty((tokens, *cache.shape[2:]), dtype=cache.dtype, device=cache.device)
        for cache in (key_cache, value_cache)
    )
    if tokens and count:
        launch.run(
            "kv_gather", (), a_thread_each("kv_gather", tokens * units),
            key_cache, value_cache, pages, cu_seqlens, keys, values,
            tokens, count, pages.shape[1], key_cache.shape[1], units,
        )  # fmt: skip
    return keys, values
