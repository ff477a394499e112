"""A linear layer with the GELU that directly follows it: one module, so that one kernel can compute both."""

from __future__ import annotations

from torch import Tensor, nn

from carpool.engine.models.surgery.activation import ACTIVATIONS, Gelu, which_activation
from carpool.engine.models.surgery.rehearsal import Rehearsal


class LinearGelu(nn.Module):
    """x [..., in] → [..., out]"""

    def __init__(self, linear: nn.Linear, gelu: Gelu) -> None:
        super().__init__()
        self.linear, self.gelu = linear, gelu

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.gelu](self.linear(x))


def fuse_gelu(path: str, parent: nn.Module, rehearsal: Rehearsal) -> bool:
    """If `parent` holds linear layers and a GELU right behind one of them, make the two one."""
    kinds = {name: which_activation(child) for name, child in parent.named_children()}
    gelus = [(name, kind) for name, kind in kinds.items() if kind == "gelu" or kind == "gelu_tanh"]
    if len(gelus) != 1:
        return False
    act, kind = gelus[0]
    return any(
        rehearsal.swap(path, parent, {name: LinearGelu(linear, kind), act: nn.Identity()})
        for name, linear in list(parent.named_children())
        if type(linear) is nn.Linear
    )
