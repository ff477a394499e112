"""Native linear layers: in float32, and in bfloat16 on CPUs that multiply it, by our own kernels instead of oneDNN's.

They were nowhere slower in a forward pass where they are taken and were measured (docs/log.md), they compile nothing
for batches of a length not met before, and what follows a product is computed while its sums are in cache and not
rounded yet: a GELU, or the residual and LayerNorm that BERT's blocks end with. A token's result does not depend on what
else is in the row.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from carpool.engine.models.surgery.activation import Gelu
from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.linear_gelu import LinearGelu
from carpool.engine.models.surgery.rehearsal import sample
from carpool.kernels import launch, native_linear
from carpool.kernels.panels import Panels
from carpool.kernels.twins_cpu import Norm

# Inputs of a layer in float32: a panel of more takes over half of a second-level cache of a megabyte and is read from
# behind it for each tile of tokens; long batches are then faster through oneDNN, which reads weights in smaller pieces.
_MOST_WIDE_INPUTS = 2048


class NativeLinear(nn.Module):
    """x float32 or bfloat16 [..., in] → [..., out], optionally through a GELU. `weight` and `bias` lie in panels."""

    kernel: ClassVar[Any] = native_linear

    def __init__(self, linear: nn.Linear, gelu: Gelu | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = gelu
        self._lay_out(linear)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.kernel.linear(x.reshape(-1, self.in_features), self.panels(), self.gelu)
        return out.view(*x.shape[:-1], self.out_features)

    def and_norm(self, x: Tensor, residual: Tensor, norm: Norm | None, *, added: bool = False) -> Tensor:
        """norm(residual + what `forward` makes of x without a GELU), rounded once; with the residual `added` behind the
        norm if so told. residual [..., out]
        """
        rows, others = x.reshape(-1, self.in_features), residual.reshape(-1, self.out_features)
        out: Tensor = self.kernel.linear_norm(rows, self.panels(), others, norm, added=added)
        return out.view(residual.shape)

    def _lay_out(self, linear: nn.Linear) -> None:
        panels = Panels.of(linear.weight, linear.bias)
        # Parameters, since replicas share those.
        self.weight = nn.Parameter(panels.weight, requires_grad=False)
        self.bias = nn.Parameter(panels.bias, requires_grad=False)

    def panels(self) -> Any:
        """What `kernel` takes. Of the weights as they are now: they may have been copied."""
        return Panels(self.weight, self.bias, self.in_features, self.out_features)


def fits(linear: nn.Module) -> bool:
    """Whether there is a kernel for it here: a plain linear layer, whole shapes, a dtype that the CPU multiplies."""
    return (
        type(linear) is nn.Linear
        and native_linear.serves(linear.weight)
        and not launch.backend.serves(linear.weight.device)
        and linear.out_features % 16 == 0
        and (
            linear.in_features <= _MOST_WIDE_INPUTS
            if linear.weight.dtype == torch.float32
            else linear.in_features % 2 == 0
        )
    )


def native(_path: str, linear: nn.Linear, gelu: Gelu | None) -> NativeLinear | None:
    """The layer laid out for our kernel, if it fits and computes the same there."""
    if not fits(linear):
        return None
    x = sample(linear)
    plain = linear if gelu is None else LinearGelu(linear, gelu)
    twin = NativeLinear(linear, gelu)
    return twin if agree(twin(x), plain(x)) else None
