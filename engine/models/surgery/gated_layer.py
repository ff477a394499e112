"""A layer of today's models in one straight line: norms, rotary positions, attention and a gated block, all native.

What such layers (ModernBERT's, Qwen's, Llama's, Gemma's, nomic's) differ in is where their norms stand, and whether
heads have some too. That is told by the order in which a layer's modules are called; what the order leaves open is
tried. Residuals are added to a product's own sums, and norms that were torch's are ours: results differ by rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from carpool.engine.models.attention import Call, calls, over, row_of
from carpool.engine.models.difference import apart
from carpool.engine.models.surgery.activation import Activation
from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.gated_mlp import GatedMLP
from carpool.engine.models.surgery.joint_linear import FirstLinear, NextLinear
from carpool.engine.models.surgery.native_linear import NativeLinear
from carpool.engine.models.surgery.rehearsal import Given, Rehearsal, weights_of
from carpool.engine.models.surgery.rms_norm import RMSNorm
from carpool.kernels import native_rows, twins_cpu
from carpool.kernels.twins_cpu import Norm

Angles = tuple[Tensor, Tensor]  # cosines and sines, [1, T, R]

# What a part is in the order of calls, by which letter.
_LETTERS: Mapping[type[nn.Module], str] = {
    RMSNorm: "n",
    nn.LayerNorm: "n",
    FirstLinear: "f",
    NextLinear: "-",
    NativeLinear: "l",
    GatedMLP: "g",
}
_ORDER = re.compile("(n?)[fl](nn)?l(n{0,2})g(n?)")
_FAR = 1 << 20  # tokens: further on than any text
# What goes into a layer on trial: small, so that what the layer adds to it shows; and large enough to show itself.
_SIZES = (0.03, 1.0)


class RowNorm(nn.Module):
    """x [..., H] → [..., H] in x's dtype. `weight` and `bias` are float32."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight, requires_grad=False)
        self.bias = None if norm.bias is None else nn.Parameter(norm.bias, requires_grad=False)
        self.eps, self.centred = norm.eps, norm.centred

    @property
    def norm(self) -> Norm:
        return Norm(self.weight, self.bias, self.eps, self.centred)

    def forward(self, x: Tensor) -> Tensor:
        rows, norm = x.reshape(-1, x.shape[-1]).contiguous(), self.norm
        normed, _ = native_rows.norm_rows(
            rows, None, norm.weight, norm.bias, norm.eps, centred=norm.centred, keep_sum=False
        )
        return normed.view(x.shape)


class Ending(nn.Module):
    """x [1, T, F] and residual [1, T, H] → norm(residual + dense(x)) or, if `added`, residual + norm(dense(x))."""

    def __init__(self, dense: NativeLinear, norm: RowNorm | None, *, added: bool) -> None:
        super().__init__()
        self.dense, self.norm, self.added = dense, norm, added

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.dense.and_norm(x, residual, _norm(self.norm), added=self.added)


class FeedForward(nn.Module):
    """[1, T, H] → [1, T, H]: a layer from its attention on, whose result it is given."""

    def __init__(
        self, norm: RowNorm | None, up: NativeLinear, activation: Activation, gate_first: bool, end: Ending
    ) -> None:
        super().__init__()
        self.norm, self.up, self.end = norm, up, end
        self.activation, self.gate_first = activation, gate_first

    def forward(self, attended: Tensor) -> Tensor:
        both: Tensor = self.up(attended if self.norm is None else self.norm(attended))
        wide = native_rows.gated(both[0], self.activation, gate_first=self.gate_first)
        done: Tensor = self.end(wide[None], attended)
        return done


class GatedLayer(nn.Module):
    """hidden [1, T, H] → [1, T, H]. Of what else it is given it minds the angles, if it turns query and key by them."""

    def __init__(
        self,
        before: RowNorm | None,
        joint: NativeLinear,
        heads: Mapping[str, RowNorm],
        out: Ending,
        feed: FeedForward,
        made: Call,
        *,
        turns: bool,
    ) -> None:
        """`heads` are the norms of `query` and `key`, if those have one; `made` is what it asks attention for."""
        super().__init__()
        self.before, self.joint, self.out, self.feed = before, joint, out, feed
        self.query, self.key = heads.get("query"), heads.get("key")
        self.size, self.kind, self.turns, self.is_causal = made.size, dict(made.kind), turns, made.causal
        self.heads = (joint.out_features // made.size - 2 * made.heads, made.heads, made.heads)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.joint(hidden if self.before is None else self.before(hidden))[0]
        query, key, value = rows.view(len(rows), -1, self.size).split(self.heads, 1)
        query = query if self.query is None else self.query(query)
        key = key if self.key is None else self.key(key)
        if self.turns:
            cosines, sines = (table[0] for table in angles_of(args, kwargs))
            query, key = (native_rows.rotary(x, cosines, sines) for x in (query, key))
        mixed = over(self, query, key, value, row_of(self), **self.kind)
        attended = self.out(mixed.flatten(1)[None], hidden)
        done: Tensor = self.feed(attended)
        return done

    @property
    def behind(self) -> tuple[nn.Module, ...]:
        """What follows its attention."""
        return self.out, self.feed

    def described(self, angles: int | None) -> twins_cpu.EncoderLayer:
        """To the kernel; `angles` is the number of those by which it turns query and key."""
        feed = self.feed
        return twins_cpu.EncoderLayer(
            joint=self.joint.panels(),
            out=self.out.dense.panels(),
            up=feed.up.panels(),
            down=feed.end.dense.panels(),
            before=_norm(self.before),
            query=_norm(self.query),
            key=_norm(self.key),
            attended=_norm(self.out.norm),
            between=_norm(feed.norm),
            done=_norm(feed.end.norm),
            activation=feed.activation,
            gate_first=feed.gate_first,
            added=self.out.added,
            angles=angles,
            heads=self.heads[0],
            kv_heads=self.heads[1],
            **{name: self.kind[name] for name in ("scale", "causal", "window", "softcap")},
        )


def angles_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Angles:
    """The first two tensors that come together in what a layer is given. Raises LookupError if there are none."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, tuple) and [isinstance(one, Tensor) for one in given] == [True, True]:
            cosines, sines = given
            return cosines, sines
    raise LookupError("a layer that turns heads by rotary angles was given none")


def as_gated_layer(path: str, module: nn.Module, rehearsal: Rehearsal) -> GatedLayer | None:
    """The module as one of these, if it holds what they do and computes the same."""
    given = rehearsal.given.get(path)
    if given is None or not given.args or not any(type(part) is GatedMLP for part in module.children()):
        return None
    try:
        trials = [Rehearsal(rehearsal.scene, {path: _of_size(size, given)}) for size in _SIZES]
        return _closest(path, module, trials)
    except Exception:  # it is called in another way, or its parts fit together otherwise
        return None


def _closest(path: str, module: nn.Module, trials: list[Rehearsal]) -> GatedLayer | None:
    """The one of its candidates that comes closest to it in all trials, if it agrees in all."""
    with calls() as made:
        parts, _ = _heard(path, module, trials[0])
    if len(made) != 1 or made[0].biased or made[0].kind["sinks"] is not None:
        return None
    before = [trial.play(path, module) for trial in trials]
    if weights_of(module) != weights_of(*parts) or not _minds_angles_alone(
        path, module, trials[0], before[0]
    ):
        return None
    found: list[tuple[float, GatedLayer]] = []
    for one in _candidates(parts, made[0]):
        said = [trial.play(path, one) for trial in trials]
        if all(map(agree, said, before)):
            found.append((max(map(apart, said, before)), one))
    return min(found, key=lambda pair: pair[0], default=(0.0, None))[1]


def _of_size(size: float, given: Given) -> Given:
    """The same with random numbers for the hidden states, which are the first of what is given."""
    hidden, *others = given.args
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * size
    return Given((noise.to(hidden), *others), given.kwargs)


def _heard(path: str, module: nn.Module, trial: Rehearsal) -> tuple[list[nn.Module], Tensor]:
    """The parts that we know, without those within them, in the order of their calls; and what the module says."""
    parts: list[nn.Module] = []

    def note(part: nn.Module, _args: object) -> None:
        parts.append(part)

    hooks = [part.register_forward_pre_hook(note) for part in _outermost(module)]
    try:
        return parts, trial.play(path, module)
    finally:
        for hook in hooks:
            hook.remove()


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _letter(child):
            yield child
        else:
            yield from _outermost(child)


def _letter(part: nn.Module) -> str:
    return next((letter for kind, letter in _LETTERS.items() if isinstance(part, kind)), "")


def _minds_angles_alone(path: str, module: nn.Module, trial: Rehearsal, before: Tensor) -> bool:
    """Whether it is given no other numbers, and says the same far behind in a text: nothing in it goes by places.

    What models do to texts of many thousands of tokens is seen in no small batch.
    """
    hidden, *args = trial.given[path].args
    kwargs = trial.given[path].kwargs
    others = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]
    if any(given.is_floating_point() for given in others):
        return False

    def on(given: Any) -> Any:
        return given + _FAR if isinstance(given, Tensor) and given.dtype == torch.int64 else given

    further = Given((hidden, *map(on, args)), {name: on(one) for name, one in kwargs.items()})
    return torch.equal(Rehearsal(trial.scene, {path: further}).play(path, module), before)


def _candidates(parts: list[nn.Module], made: Call) -> Iterator[GatedLayer]:
    """What layers these parts, called in this order, may be."""
    order = _ORDER.fullmatch("".join(map(_letter, parts)).replace("-", ""))
    parts = [part for part in parts if not isinstance(part, NextLinear)]
    if order is None:
        return
    norms: list[list[RowNorm]] = []
    for group in range(1, 5):
        start, end = max(order.start(group), 0), max(order.end(group), 0)
        norms.append([_row_norm(part) for part in parts[start:end]])
    before, heads, middle, last = norms
    joint, out, mlp = (part for part in parts if _letter(part) != "n")
    joint = joint.linear if isinstance(joint, FirstLinear) else joint
    assert isinstance(mlp, GatedMLP)
    whole = [part for part in (joint, out, mlp.both, mlp.down) if isinstance(part, NativeLinear)]
    if len(whole) != 4 or any(layer.gelu for layer in whole):
        return
    # Two norms in the middle end one block and begin the next; one ends a block if there is one behind the other.
    ends = len(middle) == 2 or bool(last)
    attended, between = (middle[:1], middle[1:]) if ends else ([], middle)
    for added, turns in product((False, True) if ends else (False,), (True, False)):
        first, second = (
            Ending(dense, norm, added=added)
            for dense, norm in ((whole[1], _one(attended)), (whole[3], _one(last)))
        )
        feed = FeedForward(_one(between), whole[2], mlp.activation, mlp.gate_first, second)
        named = dict(zip(("query", "key"), heads, strict=False))
        yield GatedLayer(_one(before), whole[0], named, first, feed, made, turns=turns)


def _row_norm(part: nn.Module) -> RowNorm:
    if isinstance(part, RMSNorm):
        return RowNorm(Norm(part.weight.float(), None, part.eps, centred=False))
    assert isinstance(part, nn.LayerNorm)
    bias = None if part.bias is None else part.bias.float()
    return RowNorm(Norm(part.weight.float(), bias, part.eps, centred=True))


def _one(norms: list[RowNorm]) -> RowNorm | None:
    return norms[0] if norms else None


def _norm(norm: RowNorm | None) -> Norm | None:
    return None if norm is None else norm.norm
