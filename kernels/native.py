"""The Python face of the native CPU kernels (kernels/cpu/): check shapes, pass pointers. ctypes frees the GIL.

`library` is None where they were not built or this CPU has no instructions for them; then the torch twins serve.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

LEVELS = ("none", "AVX2", "AVX-512", "AVX-512 BF16")  # what `carpool_cpu_level` counts


class _Shape(ctypes.Structure):
    """As kernels/cpu/attention.cpp has it."""

    _fields_ = (
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("head_size", ctypes.c_int),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("o_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("causal", ctypes.c_int),
        ("window", ctypes.c_int),
    )


def _load() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("_native.so")
    if not path.is_file():
        return None
    try:
        found = ctypes.CDLL(str(path))
    except OSError:  # made for another machine
        return None
    return found if found.carpool_cpu_level() else None


library = _load()
level = library.carpool_cpu_level() if library else 0


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attention` can take these: [T, N, D] on a CPU, heads contiguous, D a multiple of 16 up to 256."""
    size = query.shape[2]
    return (
        library is not None
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and key.dtype == value.dtype == query.dtype
        and size == value.shape[2]
        and size % 16 == 0
        and 16 <= size <= 256
        and all(x.stride(2) == 1 and x.stride(1) == size for x in (query, key, value))
    )


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
    """As `kernels.reference.varlen_attention`, for what `serves`. In bfloat16 the softmax's weights are rounded too."""
    assert library is not None
    out = torch.empty(query.shape, dtype=query.dtype)
    shape = _Shape(
        query.shape[1],
        key.shape[1],
        query.shape[2],
        *(x.stride(0) for x in (query, key, value, out)),
        scale,
        softcap or 0.0,
        causal,
        window or 0,
    )
    is_float = query.dtype == torch.float32
    kernel = library.carpool_attention_f32 if is_float else library.carpool_attention_bf16
    cu_seqlens = _cu_seqlens(tuple(runs))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (query, key, value, out))
    kernel(*pointers, cu_seqlens, len(cu_seqlens) - 1, ctypes.byref(shape), level)
    return out


@lru_cache(maxsize=64)  # every layer of a batch asks for the same
def _cu_seqlens(runs: tuple[tuple[int, int], ...]) -> ctypes.Array[ctypes.c_int32]:
    """int32 [B+1]: the cumulative lengths of runs of (length, count)."""
    lengths = list(chain.from_iterable([length] * count for length, count in runs))
    bounds = [0, *lengths]
    for i in range(1, len(bounds)):
        bounds[i] += bounds[i - 1]
    return (ctypes.c_int32 * len(bounds))(*bounds)
