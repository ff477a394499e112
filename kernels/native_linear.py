"""The Python face of kernels/cpu/linear.cpp; the twins are in `kernels.twins_cpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from carpool.kernels import native
from carpool.kernels.native import ACTIVATIONS, pointer
from carpool.kernels.panels import Panels, columns
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import Norm

_BFLOAT16 = 3  # the level that multiplies it


class _Linear(ctypes.Structure):
    """As linear.h has it."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
    )


class Finish(ctypes.Structure):
    """As linear.h has it."""

    _fields_ = (
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("centred", ctypes.c_int),
        ("residual_stride", ctypes.c_int64),
        ("added", ctypes.c_int),
    )


def serves(x: Tensor) -> bool:
    """Whether this CPU multiplies rows [T, in] of x's dtype; weights are made sure of by `Panels`."""
    return (
        native.library is not None
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and native.level >= _BFLOAT16))
        and x.device.type == "cpu"
        and x.ndim == 2
        and x.shape[1] > 0
        and x.stride(1) == 1
    )


def linear(x: Tensor, layer: Panels, activation: Activation | None = None) -> Tensor:
    """As its twin."""
    return _linear(x, layer, ACTIVATIONS[activation], None)


def linear_norm(
    x: Tensor, layer: Panels, residual: Tensor | None, norm: Norm | None, *, added: bool = False
) -> Tensor:
    """As its twin."""
    return _linear(x, layer, ACTIVATIONS[None], finish_of(x, layer.outputs, residual, norm, added=added))


def _linear(x: Tensor, layer: Panels, activation: int, finish: Finish | None) -> Tensor:
    assert native.library is not None
    _fits(x, layer)
    if x.dtype == torch.float32:
        multiply = native.library.carpool_linear_f32
        return called(multiply, described(layer), x, layer.outputs, activation, finish, native.level)
    multiply = native.library.carpool_linear_amx if layer.tiled else native.library.carpool_linear_bf16
    return called(multiply, described(layer), x, layer.outputs, activation, finish)


def described(layer: Panels) -> ctypes.Structure:
    """For linear*.cpp; it points to the layer's weights and does not hold them."""
    return _Linear(layer.weight.data_ptr(), layer.bias.data_ptr(), layer.inputs, layer.outputs)


def called(
    multiply: Callable[..., int],
    layer: ctypes.Structure,
    x: Tensor,
    outputs: int,
    activation: int,
    finish: Finish | None,
    *level: int,
) -> Tensor:
    """What a function of linear*.cpp makes of x [T, in]: [T, outputs] in x's dtype."""
    out = x.new_empty(len(x), outputs)
    native.check(
        multiply(
            ctypes.byref(layer),
            activation,
            None if finish is None else ctypes.byref(finish),
            *(pointer(x), ctypes.c_int64(x.stride(0)), len(x), pointer(out), ctypes.c_int64(out.stride(0))),
            *level,
        )
    )
    return out


def takes(x: Tensor, layer: Panels) -> bool:
    """Whether rows of x's dtype are multiplied here by a layer that is laid out like this one."""
    laid_out = native.level >= native.AMX if layer.tiled else layer.weight.shape[2] == columns(x.dtype)
    return serves(x) and x.dtype == layer.weight.dtype and laid_out


def _fits(x: Tensor, layer: Panels) -> None:
    if x.shape[1] != layer.inputs or not takes(x, layer):
        raise ValueError(
            f"{x.dtype} {list(x.shape)} is not what a layer of {layer.inputs} inputs, {layer.weight.dtype} in panels "
            f"{list(layer.weight.shape)}, multiplies here"
        )


def finish_of(
    x: Tensor, width: int, residual: Tensor | None, norm: Norm | None, *, added: bool = False
) -> Finish:
    """Of tensors that outlive the call."""
    if residual is not None and (
        residual.shape != (len(x), width) or residual.dtype != x.dtype or not serves(residual)
    ):
        raise ValueError(
            f"a residual of {residual.dtype} {list(residual.shape)} for {x.dtype} rows [{len(x)}, {width}]"
        )
    for vector in () if norm is None else (norm.weight, norm.bias):
        if vector is not None and (
            vector.dtype != torch.float32 or vector.shape != (width,) or not vector.is_contiguous()
        ):
            raise ValueError(f"a norm of {vector.dtype} {list(vector.shape)} for rows of {width}")
    return Finish(
        None if residual is None else residual.data_ptr(),
        None if norm is None else norm.weight.data_ptr(),
        None if norm is None or norm.bias is None else norm.bias.data_ptr(),
        0.0 if norm is None else norm.eps,
        norm is not None and norm.centred,
        0 if residual is None else residual.stride(0),
        added,
    )
