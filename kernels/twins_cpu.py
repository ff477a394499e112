"""What native CPU kernels compute beyond `kernels.reference`, in plain torch, under their names and signatures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carpool.kernels.panels import Panels
from carpool.kernels.reference import Activation


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm if `centred`, else RMSNorm. weight and bias float32 [H]."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Any shape, in float32 and back."""
    wide = x.float()
    if activation == "silu":
        return F.silu(wide).to(x.dtype)
    return F.gelu(wide, approximate="none" if activation == "gelu" else "tanh").to(x.dtype)


def linear(x: Tensor, layer: Panels, activation: Activation | None = None) -> Tensor:
    """activation(x · weightᵀ + bias): bfloat16 [T, in] → [T, out], summed in float32."""
    y = _product(x, layer)
    return y.to(x.dtype) if activation is None else activate(y, activation).to(x.dtype)


def linear_norm(x: Tensor, layer: Panels, residual: Tensor | None, norm: Norm | None) -> Tensor:
    """norm(residual + x · weightᵀ + bias): bfloat16 [T, in] → [T, out], rounded once."""
    return _finished(_product(x, layer), residual, norm).to(x.dtype)


def _product(x: Tensor, layer: Panels) -> Tensor:
    """float32 [T, out]"""
    weight, bias = layer.unpacked()
    return F.linear(x.float(), weight.float(), bias)


def _finished(y: Tensor, residual: Tensor | None, norm: Norm | None) -> Tensor:
    y = y if residual is None else y + residual.float()
    if norm is None:
        return y
    y = y - y.mean(1, keepdim=True) if norm.centred else y
    y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias
