"""What BERT's blocks end with, norm(dense(x) + residual): the sum and the LayerNorm in one pass over memory, or none.

On a device these passes are what the time goes into: torch takes five (two rows read and one written for the sum, one
read and one written for the norm), the kernel three. A LayerNorm alone stays torch's, whose kernel reads a row once and
writes it once as ours does. On a CPU it is for layers that run natively: both are done with the product's own sums.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.native_linear import NativeLinear, fits
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.kernels import launch, ops
from carpool.kernels.twins_cpu import Norm


class ResidualNorm(nn.Module):
    """x [..., F] and residual [..., H] → [..., H]. `dense` maps F to H; weight and bias are float32 [H]."""

    def __init__(self, dense: nn.Module, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.dense = dense
        self.weight = nn.Parameter(
            norm.weight.float(), requires_grad=False
        )  # a copy only if it is in 16 bits
        self.bias = nn.Parameter(norm.bias.float(), requires_grad=False)
        self.eps = norm.eps

    @property
    def norm(self) -> Norm:
        return Norm(self.weight, self.bias, self.eps, centred=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if isinstance(self.dense, NativeLinear):
            return self.dense.and_norm(x, residual, self.norm)
        out: Tensor = self.dense(x)
        rows, others = (each.reshape(-1, out.shape[-1]) for each in (out, residual))
        normed, _ = ops.norm_rows(
            rows, others, self.weight, self.bias, self.eps, centred=True, keep_sum=False
        )
        return normed.view(out.shape)


def residual_norm(
    path: str, module: nn.Module, rehearsal: Rehearsal, runs_natively: Callable[[nn.Module], bool] = fits
) -> ResidualNorm | None:
    """The module as a ResidualNorm, if it is one: it takes two tensors, and has one LayerNorm and one layer beside.

    On a CPU that layer has to be one that `runs_natively` when surgery is over.
    """
    given = rehearsal.given.get(path)
    if given is None or given.kwargs or len(given.args) != 2 or module._parameters:
        return None
    weighty = [child for child in module.children() if next(child.parameters(), None) is not None]
    norms = [child for child in weighty if type(child) is nn.LayerNorm]
    layers = [child for child in weighty if type(child) is not nn.LayerNorm]
    if len(norms) != 1 or len(layers) != 1 or len(norms[0].normalized_shape) != 1 or norms[0].bias is None:
        return None
    if not (launch.backend.serves(norms[0].weight.device) or runs_natively(layers[0])):
        return None
    try:
        candidate = ResidualNorm(layers[0], norms[0])
        return candidate if agree(rehearsal.play(path, candidate), rehearsal.play(path, module)) else None
    except Exception:  # it wants something else of what it was given
        return None
