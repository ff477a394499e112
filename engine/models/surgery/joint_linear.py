"""Joint linear layers: those that read the same input (query, key and value; gate and up) become one product.

    first(x)  computes all at once, returns its own part and lays the others out
    next(x)   picks its part up; the last one leaves nothing behind

The parts hang on the tensor x between the calls, and go when it goes: each thread has its own, a replica copies nothing
of it, and of a batch that fails half-way nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carpool.engine.models.surgery.rehearsal import Rehearsal


@dataclass(slots=True)
class _Parts:
    """What `owner` made of a tensor and nobody has picked up yet, in order: each [..., own width]."""

    owner: FirstLinear
    left: list[Tensor]


_LAID_OUT = "_carpool_joint_parts"  # the tensor's attribute


class FirstLinear(nn.Module):
    """Stands where the first of the layers stood. x [..., in] → [..., its width]"""

    def __init__(self, layers: Seq[nn.Linear]) -> None:
        super().__init__()
        self.linear = joined(layers)
        self.widths = [layer.out_features for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        own: Tensor
        own, *others = self.linear(x).split(self.widths, -1)
        setattr(x, _LAID_OUT, _Parts(self, others))
        return own


class NextLinear(nn.Module):
    """Stands where another of the layers stood. x [..., in] → [..., its width]; `left` parts lie there before it."""

    first: FirstLinear

    def __init__(self, first: FirstLinear, left: int) -> None:
        super().__init__()
        self.__dict__["first"] = first  # not a child: it is one already, of the same parent
        self.left = left

    def forward(self, x: Tensor) -> Tensor:
        parts: _Parts | None = getattr(x, _LAID_OUT, None)
        if parts is None or parts.owner is not self.first or len(parts.left) != self.left:
            raise RuntimeError(
                "joint linear layers were called in another order than at load: use --no-surgery"
            )
        own = parts.left.pop(0)
        if not parts.left:
            delattr(x, _LAID_OUT)
        return own


def joined(layers: Seq[nn.Linear]) -> nn.Linear:
    """One layer of the weights of all, one below the other; zeros for the bias of one that has none."""
    first = layers[0]
    width = sum(layer.out_features for layer in layers)
    linear = nn.Linear(first.in_features, width, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if any(layer.bias is not None for layer in layers):
        zeros = layers[0].weight.new_zeros
        biases = [zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        linear.bias = nn.Parameter(torch.cat(list[Tensor](biases)), requires_grad=False)
    return linear


def join(path: str, parent: nn.Module, names: Seq[str], rehearsal: Rehearsal) -> bool:
    """Make the linear layers of these names in `parent` one, if it says the same with them as one."""
    layers = [getattr(parent, name) for name in names]
    # Not what has been replaced already, nor a subclass, which computes something more.
    if any(type(layer) is not nn.Linear or layer.weight.dtype != layers[0].weight.dtype for layer in layers):
        return False

    first = FirstLinear(layers)
    others = {name: NextLinear(first, len(names) - place) for place, name in enumerate(names[1:], start=1)}
    return rehearsal.swap(path, parent, {names[0]: first, **others})
