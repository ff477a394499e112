"""What a layer does to its rows between the products, on a CUDA device (kernels/cuda/layers.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import launch
from carpool.kernels.cuda_ops.arguments import a_thread_each, alike, element_of, flat, rows_of
from carpool.kernels.launch import LaunchError
from carpool.kernels.reference import Activation


def norm_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.reference.norm_rows`."""
    rows, columns = rows_of("x", x)
    if residual is not None:
        alike(x, residual)
        if len(residual) != rows:
            raise LaunchError(f"residual has {len(residual)} rows, x has {rows}")
    flat(columns, weight=weight)
    if bias is not None:
        flat(columns, bias=bias)
    out, total = torch.empty_like(x), None
    if keep_sum:
        total = x if residual is None else torch.empty_like(x)
    if rows:
        launch.run(
            "norm_rows", (element_of("x", x),), (rows,),
            x, residual, weight, bias, out, None if residual is None else total, columns, int(centred), eps,
            shared=4 * columns,
        )  # fmt: skip
    return out, total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `kernels.reference.rotary`. x may be a view of a wider row, its heads without gaps."""
    tokens, heads, size = x.shape
    turned = cos.shape[1]
    gaps = heads > 1 and x.stride(1) != size  # the stride of one head's dimension is anything
    if x.stride(2) != 1 or gaps or cos.shape != (tokens, turned) or sin.shape != cos.shape:
        raise LaunchError(f"x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit")
    if turned % 2 or not 0 < turned <= size or not cos.is_contiguous() or not sin.is_contiguous():
        raise LaunchError(f"{turned} columns of {size} cannot be turned")
    out = torch.empty((tokens, heads, size), dtype=x.dtype, device=x.device)
    if out.numel():
        types = element_of("x", x), element_of("cos", cos)
        if types[1] not in ("float", types[0]):
            raise LaunchError(f"cos and sin must be float32 or {x.dtype}, got {cos.dtype}")
        grid = a_thread_each("rotary", tokens * heads * (size - turned // 2))
        launch.run("rotary", types, grid, x, cos, sin, out, tokens, heads, size, turned, x.stride(0))
    return out


def gated(both: Tensor, activation: Activation, *, gate_first: bool = True) -> Tensor:
    """See `kernels.reference.gated`."""
    rows, columns = rows_of("both", both, widest=None)
    vector = 16 // both.element_size()
    if columns % (2 * vector):
        raise LaunchError(f"each half must be whole 16 bytes, got {columns} columns in all")
    out = torch.empty((rows, columns // 2), dtype=both.dtype, device=both.device)
    if rows:
        grid = a_thread_each("gated", out.numel() // vector)
        number = ("silu", "gelu", "gelu_tanh").index(activation)
        launch.run(
            "gated", (element_of("both", both),), grid, both, out, rows, columns // 2, number, int(gate_first)
        )
    return out
