"""Gated feed-forward: down(act(gate(x)) * up(x)), with gate and up as one product.

Which half is the gate and which activation it goes through is found by asking the module that is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from carpool.engine.models.surgery.activation import ACTIVATIONS, Activation, which_activation
from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.joint_linear import joined
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.kernels import launch, native_rows, ops


class GatedMLP(nn.Module):
    """x [..., H] → [..., H]"""

    def __init__(self, both: nn.Linear, down: nn.Module, activation: Activation, *, gate_first: bool) -> None:
        """`both` has the rows of gate and up, in the order that `gate_first` says."""
        super().__init__()
        self.both, self.down = both, down
        self.activation, self.gate_first = activation, gate_first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self._gated(self.both(x)))
        return out

    def _gated(self, both: Tensor) -> Tensor:
        """[..., 2F] → [..., F]"""
        on_device, width = launch.backend.serves(both.device), both.shape[-1] // 2
        if on_device or native_rows.serves(both, width):  # one kernel, which reads each half once
            kernel = ops.gated if on_device else native_rows.gated
            made = kernel(both.reshape(-1, 2 * width), self.activation, gate_first=self.gate_first)
            return made.view(*both.shape[:-1], width)
        one, other = both.chunk(2, -1)
        gate, up = (one, other) if self.gate_first else (other, one)
        return ACTIVATIONS[self.activation](gate).mul_(up)


def gated(path: str, module: nn.Module, rehearsal: Rehearsal) -> GatedMLP | None:
    """The module as a GatedMLP, if it is one."""
    given = rehearsal.given.get(path)
    if given is None or len(given.args) != 1 or given.kwargs or not _made_of_the_like(module):
        return None
    try:
        before = rehearsal.play(path, module)
        for candidate in _candidates(module):
            if agree(rehearsal.play(path, candidate), before):
                return candidate
    except Exception:  # it wants something around it, or its layers fit together otherwise
        pass
    return None


def _made_of_the_like(module: nn.Module) -> bool:
    """Linear layers, and nothing beside them that has weights."""
    others = [child for child in module.children() if type(child) is not nn.Linear]
    own = next(module.parameters(recurse=False), None)
    return own is None and all(next(other.parameters(), None) is None for other in others)


def _candidates(module: nn.Module) -> Iterator[GatedMLP]:
    linears = [child for child in module.children() if type(child) is nn.Linear]
    own = {kind for child in module.children() if (kind := which_activation(child))}
    for down in linears:
        halves = [layer for layer in linears if layer is not down]
        if (
            not halves
            or len(linears) > 3
            or any(half.in_features != halves[0].in_features for half in halves)
        ):
            continue
        if sum(half.out_features for half in halves) != 2 * down.in_features:
            continue
        both = joined(halves) if len(halves) == 2 else halves[0]
        for activation in own or ACTIVATIONS:  # one that is no module is found by trying
            for gate_first in (True, False):
                yield GatedMLP(both, down, activation, gate_first=gate_first)
