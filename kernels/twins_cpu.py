"""What native CPU kernels compute beyond `kernels.reference`, in plain torch, under their names and signatures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
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
    """activation(x · weightᵀ + bias): [T, in] → [T, out] in the weights' dtype, summed in float32."""
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


# ── in 8-bit integers ────────────────────────────────────────────────────────────────────────────────────────

_LEVELS = 255  # of a row, from its smallest number to its largest


def leveled(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [R, in] → uint8 [R, in]; for each row the height of a level and level 0, both float32 [R, 1].

    Where a number or the range is not finite, the height is NaN.
    """
    wide = rows.float()
    smallest, largest = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    step = (largest - smallest).div_(_LEVELS).clamp_min_(1e-20)
    levels = (wide - smallest).mul_(step.reciprocal()).round_()
    # By way of int8, to which torch converts many numbers at a time; turning the highest bit adds 128.
    signed = levels.sub_(128).to(torch.int8)
    height = torch.where(step.isfinite(), step, torch.nan)
    return signed.view(torch.uint8).bitwise_xor_(128), height, smallest


def linear8(x: Tensor, layer: Panels8, activation: Activation | None = None) -> Tensor:
    """activation(x · weightᵀ + bias) of what `leveled` makes of x: [T, in] → [T, out], the integers' product exact."""
    y = _product8(x, layer)
    return y.to(x.dtype) if activation is None else activate(y, activation).to(x.dtype)


def linear8_norm(x: Tensor, layer: Panels8, residual: Tensor | None, norm: Norm | None) -> Tensor:
    """norm(residual + x · weightᵀ + bias) of what `leveled` makes of x: [T, in] → [T, out], rounded once."""
    return _finished(_product8(x, layer), residual, norm).to(x.dtype)


def _product8(x: Tensor, layer: Panels8) -> Tensor:
    """float32 [T, out]"""
    levels, height, smallest = leveled(x)
    product = levels.double() @ layer.unpacked().double().T
    step, total, bias = (vector[: layer.outputs] for vector in (layer.step, layer.sum, layer.bias))
    return product.float() * height * step + (smallest * total + bias)
