"""Packed linear layers: weights kept in the blocked layout that oneDNN multiplies from on a CPU.

It would reorder them on every call otherwise, and a GELU behind the layer is computed while its output is in cache. For
layers that do not run natively: on other CPUs, of odd shapes, in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carpool.engine.models.surgery.activation import APPROXIMATION, Gelu
from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.linear_gelu import LinearGelu
from carpool.engine.models.surgery.rehearsal import sample


class PackedLinear(nn.Module):
    """x [..., in] → [..., out], optionally through a GELU. `weight` is opaque: oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear, gelu: Gelu | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self._post = ("none", "") if gelu is None else ("gelu", APPROXIMATION[gelu])

    def forward(self, x: Tensor) -> Tensor:
        operation, variant = self._post
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, operation, [], variant)
        return out


def packed(_path: str, linear: nn.Linear, gelu: Gelu | None) -> PackedLinear | None:
    """The layer in oneDNN's layout, if it computes the same there."""
    x = sample(linear)
    plain = linear if gelu is None else LinearGelu(linear, gelu)
    try:
        twin = PackedLinear(linear, gelu)
        return twin if agree(twin(x), plain(x)) else None
    except RuntimeError:  # a shape or dtype that oneDNN does not take on this CPU
        return None
