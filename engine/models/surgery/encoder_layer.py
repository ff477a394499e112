"""BERT's layer in one straight line: four products and attention, without what transformers does around them.

A layer of BERT's kind is a dozen modules, keyword arguments, views and checks that are the same each time; of one short
text they took longer than the arithmetic (docs/log.md). The four linear modules are those that were there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from carpool.engine.models.attention import Call, calls, layout, over, row_of
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.agreement import agree, holds
from carpool.engine.models.surgery.joint_linear import FirstLinear, NextLinear
from carpool.engine.models.surgery.linear_gelu import LinearGelu
from carpool.engine.models.surgery.native_linear import NativeLinear
from carpool.engine.models.surgery.packed_linear import PackedLinear
from carpool.engine.models.surgery.rehearsal import Rehearsal, small_batch
from carpool.engine.models.surgery.residual_norm import ResidualNorm

_UPS = (NativeLinear, PackedLinear, LinearGelu)
_OURS = (FirstLinear, NextLinear, ResidualNorm, *_UPS)


class EncoderLayer(nn.Module):
    """hidden [1, T, H] → [1, T, H]. What else it is given says nothing to a packed row."""

    def __init__(
        self,
        joint: nn.Module,
        out: ResidualNorm,
        up: nn.Module,
        down: ResidualNorm,
        size: int,
        kind: Mapping[str, Any],
    ) -> None:
        """`joint` makes query, key and value, all as wide, in heads of `size`; `kind` of attention as `over` has it."""
        super().__init__()
        self.joint, self.out, self.up, self.down = joint, out, up, down
        self.size, self.kind = size, dict(kind)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        heads: Tensor = self.joint(hidden).view(hidden.shape[1], 3, -1, self.size)
        query, key, value = heads.unbind(1)
        mixed = over(self, query, key, value, row_of(self), **self.kind)
        attended: Tensor = self.out(mixed.reshape(hidden.shape), hidden)
        done: Tensor = self.down(self.up(attended), attended)
        return done


def straighten(backbone: Backbone, *, vocab_size: int) -> int:
    """Swap every layer that is one of these, in place; returns how many were. To be done when all else was swapped."""
    model = backbone.module
    if backbone.packing == "padded" or not any(
        isinstance(module, ResidualNorm) for module in model.modules()
    ):
        return 0
    batch = small_batch(vocab_size, next(model.parameters()).device)
    before: list[Tensor] = []
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    with torch.inference_mode(False), torch.no_grad():
        rehearsal = Rehearsal.of(
            model, lambda: before.append(backbone.forward(batch)), scene=lambda: layout(batch)
        )
        for path, module in reversed(list(model.named_modules())):  # a model of one layer is not taken for it
            found = _straight(path, module, rehearsal)
            if found is not None:
                above, _, name = path.rpartition(".")
                parent = model.get_submodule(above)
                setattr(parent, name, found)
                swapped.append((parent, name, module))
        if holds(lambda: backbone.forward(batch), before[0]):
            return len(swapped)
    for parent, name, module in swapped:
        setattr(parent, name, module)
    return 0


def _straight(path: str, module: nn.Module, rehearsal: Rehearsal) -> EncoderLayer | None:
    """The module as one of these, if it holds what they do and computes the same."""
    if path not in rehearsal.given or type(module) in _OURS:
        return None
    ours = _outermost(module)
    joints = [part for part in ours if isinstance(part, FirstLinear)]
    norms = [part for part in ours if isinstance(part, ResidualNorm)]
    ups = [part for part in ours if isinstance(part, _UPS)]
    if (len(joints), len(norms), len(ups)) != (1, 2, 1):
        return None
    joint, (out, down), (up,) = joints[0], norms, ups
    if len(joint.widths) != 3 or len(set(joint.widths)) != 1:
        return None
    if _weights(module) != _weights(joint, out, up, down):  # it has something else to compute
        return None
    try:
        with calls() as made:
            before = rehearsal.play(path, module)
        if not _plain(made) or made[0].heads * made[0].size != joint.widths[0]:
            return None
        candidate = EncoderLayer(joint.linear, out, up, down, made[0].size, made[0].kind)
        return candidate if agree(rehearsal.play(path, candidate), before) else None
    except Exception:  # it is called in another way
        return None


def _outermost(module: nn.Module) -> list[nn.Module]:
    """What of ours it holds, in order, without what is within that."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, _OURS) else _outermost(child)
    return found


def _weights(*modules: nn.Module) -> set[int]:
    return {id(weight) for module in modules for weight in (*module.parameters(), *module.buffers())}


def _plain(made: list[Call]) -> bool:
    """Whether it attends once, to both sides, and by what it is given alone."""
    return len(made) == 1 and not made[0].causal and not made[0].biased and made[0].kind["sinks"] is None
