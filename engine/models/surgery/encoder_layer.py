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
from carpool.engine.models.difference import tokens_apart
from carpool.engine.models.surgery.agreement import agree, holds
from carpool.engine.models.surgery.gated_layer import as_gated_layer
from carpool.engine.models.surgery.gated_mlp import GatedMLP
from carpool.engine.models.surgery.joint_linear import FirstLinear, NextLinear
from carpool.engine.models.surgery.linear_gelu import LinearGelu
from carpool.engine.models.surgery.native_linear import NativeLinear
from carpool.engine.models.surgery.packed_linear import PackedLinear
from carpool.engine.models.surgery.rehearsal import Given, Rehearsal, small_batch, weights_of
from carpool.engine.models.surgery.residual_norm import ResidualNorm
from carpool.kernels import twins_cpu

_UPS = (NativeLinear, PackedLinear, LinearGelu)
_OURS = (FirstLinear, NextLinear, ResidualNorm, *_UPS)
_MAY_CHANGE = 1e-3  # relative
_MAY_CHANGE_16_BIT = 0.1


class EncoderLayer(nn.Module):
    """hidden [1, T, H] → [1, T, H]. Of what else it is given a packed row minds a bias by distance alone."""

    def __init__(
        self,
        joint: nn.Module,
        out: ResidualNorm,
        up: nn.Module,
        down: ResidualNorm,
        size: int,
        kind: Mapping[str, Any],
    ) -> None:
        """`joint` makes query, key and value, all as wide, in heads of `size`. `kind` of attention as `over` has it,
        with a bias if it is to take those that it is given.
        """
        super().__init__()
        self.joint, self.out, self.up, self.down = joint, out, up, down
        self.size, self.biased = size, kind["bias"] is not None
        self.kind = {name: value for name, value in kind.items() if name != "bias"}

    def forward(self, hidden: Tensor, *_: Any, position_bias: Tensor | None = None, **__: Any) -> Tensor:
        heads: Tensor = self.joint(hidden).view(hidden.shape[1], 3, -1, self.size)
        query, key, value = heads.unbind(1)
        bias = position_bias if self.biased else None
        mixed = over(self, query, key, value, row_of(self), **self.kind, bias=bias)
        attended: Tensor = self.out(mixed.reshape(hidden.shape), hidden)
        done: Tensor = self.down(self.up(attended), attended)
        return done

    @property
    def behind(self) -> tuple[nn.Module, ...]:
        """What follows its attention."""
        return self.out, self.up, self.down

    def described(self, _angles: int | None) -> twins_cpu.EncoderLayer | None:
        """To the kernel; None unless its products are native."""
        products = self.joint, self.out.dense, self.up, self.down.dense
        native = [product for product in products if isinstance(product, NativeLinear)]
        if len(native) < len(products):
            return None
        joint, out, up, down = native
        return twins_cpu.EncoderLayer(
            joint=joint.panels(),
            out=out.panels(),
            up=up.panels(),
            down=down.panels(),
            attended=self.out.norm,
            done=self.down.norm,
            activation=up.gelu,
            heads=joint.out_features // 3 // self.size,
            biased=self.biased,
            **{name: self.kind[name] for name in ("scale", "window", "softcap")},
        )


def straighten(backbone: Backbone, *, vocab_size: int) -> int:
    """Swap every layer that is one of these or a `GatedLayer`, in place; returns how many were. To be done when all
    else was swapped.
    """
    model = backbone.module
    if backbone.packing == "padded" or not any(
        isinstance(module, (ResidualNorm, GatedMLP)) for module in model.modules()
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
            found = _straight(path, module, rehearsal) or as_gated_layer(path, module, rehearsal)
            if found is not None:
                above, _, name = path.rpartition(".")
                parent = model.get_submodule(above)
                answer_alike(found, module)
                setattr(parent, name, found)
                swapped.append((parent, name, module))
        if holds(lambda: backbone.forward(batch), before[0], _alike):
            return len(swapped)
    for parent, name, module in swapped:
        setattr(parent, name, module)
    return 0


def answer_alike(new: nn.Module, old: nn.Module) -> None:
    """Give a module what another says of itself: some models ask their layers for what kind they are."""
    for name, value in vars(old).items():
        if isinstance(value, (str, int, float)) and not name.startswith("_") and name not in vars(new):
            setattr(new, name, value)


def _alike(new: Tensor, old: Tensor) -> bool:
    """By most tokens, of a model as a whole: rounding grows with its depth."""
    bound = _MAY_CHANGE if old.dtype == torch.float32 else _MAY_CHANGE_16_BIT
    return bool(tokens_apart(new, old).median() <= bound)


def _straight(path: str, module: nn.Module, rehearsal: Rehearsal) -> EncoderLayer | None:
    """The module as one of these, if it holds what they do and computes the same."""
    if path not in rehearsal.given or type(module) in _OURS:
        return None
    parts = _outermost(module)
    ours = _with_norms(parts)
    joints = [part for part in ours if isinstance(part, FirstLinear)]
    norms = [part for part in ours if isinstance(part, ResidualNorm)]
    ups = [part for part in ours if isinstance(part, _UPS)]
    whole = (len(joints), len(norms), len(ups)) == (1, 2, 1)
    if not whole or any(isinstance(part, nn.LayerNorm) for part in ours):
        return None
    joint, (out, down), (up,) = joints[0], norms, ups
    if len(joint.widths) != 3 or len(set(joint.widths)) != 1:
        return None
    if weights_of(module) != weights_of(*parts):  # it has something else to compute
        return None
    try:
        with calls() as made:
            before = rehearsal.play(path, module)
        if not _plain(made, rehearsal.given[path]) or made[0].heads * made[0].size != joint.widths[0]:
            return None
        candidate = EncoderLayer(joint.linear, out, up, down, made[0].size, made[0].kind)
        return candidate if agree(rehearsal.play(path, candidate), before) else None
    except Exception:  # it is called in another way
        return None


def _outermost(module: nn.Module) -> list[nn.Module]:
    """What of ours it holds, in order, without what is within that."""
    found: list[nn.Module] = []
    for child in module.children():
        known = isinstance(child, _OURS) or type(child) is nn.LayerNorm
        found += [child] if known else _outermost(child)
    return found


def _with_norms(parts: list[nn.Module]) -> list[nn.Module]:
    """The same, a product and the LayerNorm behind it as one: MPNet has them in different modules."""
    found: list[nn.Module] = []
    for part in parts:
        behind = bool(found) and isinstance(found[-1], NativeLinear)
        if behind and isinstance(part, nn.LayerNorm) and part.bias is not None:
            part = ResidualNorm(found.pop(), part)
        found.append(part)
    return found


def _plain(made: list[Call], given: Given) -> bool:
    """Whether it attends once, to both sides, and by what it is given alone, biased or not."""
    if len(made) != 1 or made[0].causal or made[0].kind["sinks"] is not None:
        return False
    own, told = made[0].kind["bias"], given.kwargs.get("position_bias")
    return told is None if own is None else told is not None and torch.equal(own, told)
