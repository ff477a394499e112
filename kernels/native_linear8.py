"""The Python face of kernels/cpu/linear8*.cpp; the twins are in `kernels.twins_cpu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from carpool.kernels import native, native_linear
from carpool.kernels.native import ACTIVATIONS
from carpool.kernels.native_linear import Finish, finish_of
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import Norm


class _Linear(ctypes.Structure):
    """As linear.h has it."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
    )


_MOST_INPUTS = (2**31 - 1) // (255 * 127)  # of which the products' sum is sure to be an int32

multiplies = native.library is not None and bool(native.library.carpool_cpu_multiplies_int8())


def serves(x: Tensor) -> bool:
    """Whether this CPU multiplies rows [T, in] of x's dtype by 8-bit weights; those are made sure of by `Panels8`."""
    return multiplies and native_linear.serves(x) and x.shape[1] <= _MOST_INPUTS


def linear(x: Tensor, layer: Panels8, activation: Activation | None = None) -> Tensor:
    """As its twin."""
    return _linear(x, layer, ACTIVATIONS[activation], None)


def linear_norm(
    x: Tensor, layer: Panels8, residual: Tensor | None, norm: Norm | None, *, added: bool = False
) -> Tensor:
    """As its twin."""
    return _linear(x, layer, ACTIVATIONS[None], finish_of(x, layer.outputs, residual, norm, added=added))


def _linear(x: Tensor, layer: Panels8, activation: int, finish: Finish | None) -> Tensor:
    assert native.library is not None
    if not serves(x) or x.shape[1] != layer.inputs:
        raise ValueError(
            f"{x.dtype} {list(x.shape)} is not what an 8-bit layer of {layer.inputs} inputs multiplies here"
        )
    is_float = x.dtype == torch.float32
    multiply = native.library.carpool_linear_int8_f32 if is_float else native.library.carpool_linear_int8_bf16
    return native_linear.called(
        multiply, described(layer), x, layer.outputs, activation, finish, native.level
    )


def described(layer: Panels8) -> ctypes.Structure:
    """As `native_linear.described`."""
    parts = layer.weight, layer.step, layer.sum, layer.bias
    return _Linear(*[part.data_ptr() for part in parts], layer.inputs, layer.outputs)
