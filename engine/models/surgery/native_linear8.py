"""Native linear layers in 8-bit integers, where the CPU multiplies them: rounding, product and what follows, one call.

oneDNN multiplies as fast, but finding each token's scale, rounding, and multiplying back are passes of their own there,
which in layers of a few hundred took what the product had saved (docs/log.md).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from carpool.engine.models.surgery.native_linear import NativeLinear
from carpool.kernels import launch, native_linear8
from carpool.kernels.panels8 import Panels8


class NativeLinear8(NativeLinear):
    """x [..., in] → [..., out] in x's dtype, optionally through a GELU. What `Panels8` holds, in panels."""

    kernel: ClassVar[Any] = native_linear8

    def _lay_out(self, linear: nn.Linear) -> None:
        panels = Panels8.of(linear.weight, linear.bias)
        self.weight = nn.Parameter(panels.weight, requires_grad=False)
        self.step = nn.Parameter(panels.step, requires_grad=False)
        self.sum = nn.Parameter(panels.sum, requires_grad=False)
        self.bias = nn.Parameter(panels.bias, requires_grad=False)

    def panels(self) -> Any:
        return Panels8(self.weight, self.step, self.sum, self.bias, self.in_features, self.out_features)


def fits8(linear: nn.Module) -> bool:
    """Whether there is a kernel for it here: a plain linear layer of whole shapes, on such a CPU."""
    return (
        type(linear) is nn.Linear
        and native_linear8.serves(linear.weight)
        and not launch.backend.serves(linear.weight.device)
        and linear.out_features % 16 == 0
        and linear.in_features % 16 == 0
    )
