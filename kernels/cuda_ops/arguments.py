"""What kernels take for granted of their arguments, how many blocks they are launched in, and what they write to."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import cuda_table
from carpool.kernels.launch import ELEMENTS, LaunchError
from carpool.kernels.reference import OUTPUTS, Output

WIDEST = 8192  # columns of a row that a block holds in shared memory
EPS = 1e-12  # the least length that a vector is divided by


def rows_of(name: str, rows: Tensor, *, aligned: bool = True, widest: int | None = WIDEST) -> tuple[int, int]:
    """How many and how wide: [R, H]. Where a kernel reads vectors of 16 bytes, rows are `aligned` to them."""
    if rows.ndim != 2 or not rows.is_contiguous() or not rows.shape[1]:
        raise LaunchError(f"{name} must be [R, H] without gaps, got {tuple(rows.shape)}")
    columns = rows.shape[1]
    if aligned and (columns * rows.element_size() % 16 or rows.data_ptr() % 16):
        raise LaunchError(f"{name}: rows must be whole 16 bytes, aligned to them; got {columns} columns")
    if aligned and widest is not None and columns > widest:
        raise LaunchError(f"{name}: {columns} columns do not fit in shared memory, which takes {widest}")
    return len(rows), columns


def alike(one: Tensor, other: Tensor) -> int:
    """Columns of two tensors of rows that have as many, and one dtype."""
    columns = rows_of("rows", one)[1]
    if rows_of("rows", other)[1] != columns or one.dtype != other.dtype:
        raise LaunchError(
            f"{tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype} are not rows of a kind"
        )
    return columns


def flat(count: int, **named: Tensor) -> None:
    for name, values in named.items():
        if values.shape != (count,) or not values.is_contiguous():
            raise LaunchError(f"{name} must be [{count}], got {tuple(values.shape)}")


def bounds_of(cu_seqlens: Tensor) -> int:
    """How many sequences there are."""
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or not cu_seqlens.is_contiguous():
        raise LaunchError(f"cumulative lengths must be [B+1], got {tuple(cu_seqlens.shape)}")
    return len(cu_seqlens) - 1


def caches_of(key_cache: Tensor, value_cache: Tensor) -> int:
    """How many times 16 bytes a token's heads have."""
    if key_cache.shape != value_cache.shape or key_cache.dtype != value_cache.dtype or key_cache.ndim != 4:
        raise LaunchError(f"caches must be alike, [P, S, N, D]; got {tuple(key_cache.shape)}")
    size = key_cache.shape[2] * key_cache.shape[3] * key_cache.element_size()
    if size % 16 or not size or not key_cache.is_contiguous() or not value_cache.is_contiguous():
        raise LaunchError(f"a token's heads must be whole 16 bytes without gaps, got {size}")
    return size // 16


def element_of(name: str, rows: Tensor) -> str:
    element = ELEMENTS.get(rows.dtype)
    if element not in cuda_table.FLOATS:
        raise LaunchError(f"{name} must be float32, float16 or bfloat16, got {rows.dtype}")
    return element


def a_warp_each(kernel: str, rows: int) -> tuple[int, ...]:
    return (-(-rows * 32 // cuda_table.BY_NAME[kernel].threads),)


def a_thread_each(kernel: str, items: int) -> tuple[int, ...]:
    return (-(-items // cuda_table.BY_NAME[kernel].threads),)


def outputs_of(count: int, columns: int, output: Output, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and scales to be written."""
    pitch = -(-columns // 8) if output == "binary" else columns
    rows = torch.empty((count, pitch), dtype=OUTPUTS[output], device=device)
    return rows, torch.empty(count, dtype=torch.float32, device=device)
