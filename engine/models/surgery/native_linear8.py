"""Native linear layers in 8-bit integers, where the CPU multiplies them: rounding, product and what follows, one call.

oneDNN multiplies as fast, but finding each token's scale, rounding, and multiplying back are passes of their own there,
which in layers of a few hundred took what the product had saved (docs/log.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from carpool.engine.models.surgery.activation import Gelu
from carpool.kernels import launch, native_linear8
from carpool.kernels.panels8 import Panels8
from carpool.kernels.twins_cpu import Norm


class NativeLinear8(nn.Module):
    """x [..., in] → [..., out] in x's dtype, optionally through a GELU. What `Panels8` holds, in panels."""

    def __init__(self, linear: nn.Linear, gelu: Gelu | None = None) -> None:
        super().__init__()
        panels = Panels8.of(linear.weight, linear.bias)
        # Parameters, since replicas share those.
        self.weight = nn.Parameter(panels.weight, requires_grad=False)
        self.step = nn.Parameter(panels.step, requires_grad=False)
        self.sum = nn.Parameter(panels.sum, requires_grad=False)
        self.bias = nn.Parameter(panels.bias, requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        out = native_linear8.linear(x.reshape(-1, self.in_features), self._panels(), self.gelu)
        return out.view(*x.shape[:-1], self.out_features)

    def and_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        """norm(residual + what `forward` makes of x without a GELU), rounded once. residual [..., out]"""
        rows, others = x.reshape(-1, self.in_features), residual.reshape(-1, self.out_features)
        return native_linear8.linear_norm(rows, self._panels(), others, norm).view(residual.shape)

    def _panels(self) -> Panels8:
        """Of the weights as they are now: they may have been copied."""
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
