"""Quantisation: linear layers in 8-bit integers on a CPU, weights and activations both (W8A8).

    x ≈ m + q s    q uint8 [T, in]; m, s float32 [T, 1]: from the smallest x of a token's own row to the largest
    W ≈ V w        V int8 [out, in]; w float32 [out, 1]: a step is a 127th of a row's largest |W|
    x Wᵀ ≈ s (q Vᵀ) wᵀ + m (Σ V) wᵀ, the product of integers exact

A token's scale is its own, so who rides beside it changes nothing. Embeddings, norms, attention and heads stay float.
Layers run natively where there is a kernel for them, else through oneDNN: on the same integers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carpool.engine.errors import ConfigError
from carpool.engine.models.attention import layout
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery import turn_round
from carpool.engine.models.surgery.activation import ACTIVATIONS, APPROXIMATION, Gelu
from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.leaves import replace_linears
from carpool.engine.models.surgery.native_linear8 import NativeLinear8, fits8
from carpool.engine.models.surgery.rehearsal import Rehearsal, sample, small_batch
from carpool.kernels.panels8 import quantized
from carpool.kernels.twins_cpu import Norm, leveled

_ROWS = 256  # at a time: what lies between the passes over them stays in the cache
# The rest of what oneDNN is told: no bias, which it would scale with the output, and float32.
_TO_FLOAT32: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
# What users are told of if it is less: the share of weights outside embeddings, the cosine of hidden states.
_MOST = 0.5
_CLOSE = 0.98
# Layers that choose experts: rounded, they would choose others.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")


class QuantizedLinear(nn.Module):
    """x [..., in] → [..., out] in x's dtype, optionally through a GELU. `weight` is opaque: oneDNN's int8 layout.

    For layers that do not run natively: on CPUs without AVX-512 VNNI, of odd shapes.
    """

    def __init__(self, linear: nn.Linear, gelu: Gelu | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        whole, step = quantized(linear.weight.detach())
        packed = torch.ops.onednn.qlinear_prepack(whole, None)
        # Parameters all, since replicas share those.
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.step = nn.Parameter(step[:, 0].contiguous(), requires_grad=False)
        self.zero = nn.Parameter(torch.zeros(len(step), dtype=torch.int32), requires_grad=False)
        self.sum = nn.Parameter(
            whole.sum(1) * self.step, requires_grad=False
        )  # what an input of ones becomes
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        out = rows.new_empty(len(rows), self.out_features)
        for some, place in zip(torch.split(rows, _ROWS), torch.split(out, _ROWS), strict=True):
            place.copy_(self._some(some))
        return out.view(*x.shape[:-1], self.out_features)

    def _some(self, rows: Tensor) -> Tensor:
        """[R, in] → float32 [R, out]"""
        levels, step, smallest = leveled(rows)
        weight = (self.weight, self.step, self.zero)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(levels, 1.0, 0, *weight, *_TO_FLOAT32)
        out.mul_(step).addcmul_(smallest, self.sum)
        if self.bias is not None:
            out.add_(self.bias)
        if self.gelu is not None:
            torch.ops.aten.gelu_(out, approximate=APPROXIMATION[self.gelu])
        return out


def quantize(backbone: Backbone, *, vocab_size: int) -> tuple[int, list[str]]:
    """Quantise the linear layers in place; returns how many, and a sentence on each thing that users should know.

    Raises ConfigError if that cannot be done here.
    """
    model = backbone.module
    name = type(model).__name__
    _check_arithmetic()
    batch = small_batch(vocab_size, torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad():
        said: list[Tensor] = []
        turn_round(model)  # which surgery has done, unless it was not to be
        rehearsal = Rehearsal.of(
            model, lambda: said.append(backbone.forward(batch).float()), scene=lambda: layout(batch)
        )
        tables = {id(child.weight) for child in model.modules() if isinstance(child, nn.Embedding)}
        weights = sum(weight.numel() for weight in model.parameters() if id(weight) not in tables)
        count = sum(replace_linears(model, rehearsal, _twin, likeness=_sane))
        cosine = float(F.cosine_similarity(backbone.forward(batch).float(), said[0], dim=-1).median())
    if not count:
        raise ConfigError(f"--quantization int8: {name} has no linear layer that it knows how to quantise.")
    layers = [module for module in model.modules() if isinstance(module, (NativeLinear8, QuantizedLinear))]
    covered = sum(layer.in_features * layer.out_features for layer in layers) / weights
    notices = []
    if covered < _MOST:
        notices.append(f"Of the weights of {name} only {covered:.0%} are in linear layers and run in int8.")
    if not cosine >= _CLOSE:
        notices.append(
            f"In int8 the hidden states of {name} have cosine {cosine:.3f} to those in float: check them."
        )
    return count, notices


def _twin(path: str, linear: nn.Linear, gelu: Gelu | None) -> NativeLinear8 | QuantizedLinear | None:
    """The layer quantised, if it then computes exactly what its integers say."""
    if _ROUTER.search(path):
        return None
    x = sample(linear)
    twin = NativeLinear8(linear, gelu) if fits8(linear) else QuantizedLinear(linear, gelu)
    weight, step = quantized(linear.weight)
    levels, height, smallest = leveled(x[0])
    told = (levels.float() * height + smallest) @ (weight.float() * step).T
    if linear.bias is not None:
        told += linear.bias.float()
    if isinstance(twin, NativeLinear8) and gelu is None:
        whole = Norm(torch.ones(len(step)), None, 1e-6, centred=True)
        normed = F.layer_norm(told, [len(step)], eps=whole.eps).to(x.dtype)
        if not agree(twin.and_norm(x[0], torch.zeros_like(normed), whole), normed):
            return None
    if gelu is not None:
        told = ACTIVATIONS[gelu](told)
    return twin if agree(twin(x)[0], told.to(x.dtype)) else None


def _sane(new: Tensor, old: Tensor) -> bool:
    """Whether a module with quantised layers runs at all: what they compute has been checked."""
    return new.shape == old.shape and bool(new.isfinite().all())


def _check_arithmetic() -> None:
    """Without VNNI, oneDNN may add pairs of products in 16 bits, which overflow: the largest ones show it."""
    ones = nn.Linear(64, 64, bias=False)
    nn.init.ones_(ones.weight)
    x = torch.ones(16, 64)
    x[:, 0] = 0  # so that all others are on the highest level
    try:
        with torch.no_grad():
            out = QuantizedLinear(ones)(x)
    except RuntimeError as error:
        raise ConfigError(f"--quantization int8: torch has no 8-bit products here ({error}).") from error
    if not agree(out, torch.full_like(out, 63)):
        raise ConfigError("--quantization int8: 8-bit products overflow on this CPU; it takes one with VNNI.")
