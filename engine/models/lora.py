"""LoRA: adapters of low rank over shared weights, a different one for each sequence of a batch.

    layer(x) = base(x) + x Aᵀ Bᵀ                A [r, in], B [out, r], the adapter's scaling inside B

Sequences that ride on one adapter are neighbours, so its tokens are one segment of rows, and each segment costs two
small products in a layer. Segments come through a context variable, as the attention's layout does: each thread has
its own, and nothing has to be handed down through models that know nothing of adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Segment(NamedTuple):
    """Rows `start` to `end` ride on the adapter in `slot`; 0 is the model as it stands."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one layer's weight [out, in]: `up` [out, r] @ `down` [r, in], float32, scaled already."""

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, as a linear layer has it: (out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def matrix(self) -> Tensor:
        """The whole of it, float32 [out, in]."""
        return self.up @ self.down


class Fitted(NamedTuple):
    """A delta as its layer holds it, shared by the layer's replicas."""

    down: nn.Parameter
    up: nn.Parameter


_riding: ContextVar[tuple[Segment, ...]] = ContextVar("carpool_adapters", default=())


@contextmanager
def riding(slots: Seq[int], lengths: Seq[int]) -> Iterator[None]:
    """Within this block this thread's forward passes are over sequences of `lengths` rows that ride on `slots`.

    No slots: all ride on the model as it stands. A padded batch [B, L] is B sequences of L rows.
    """
    token = _riding.set(segments(slots, lengths) if slots else ())
    try:
        yield
    finally:
        _riding.reset(token)


def segments(slots: Seq[int], lengths: Seq[int]) -> tuple[Segment, ...]:
    """The runs of equal slots, end to end over all rows; () if all are 0."""
    if not any(slots):
        return ()
    found: list[Segment] = []
    end = 0
    for slot, same in groupby(zip(slots, lengths, strict=True), key=lambda pair: pair[0]):
        start, end = end, end + sum(length for _, length in same)
        found.append(Segment(slot, start, end))
    return tuple(found)


class _Adapted(nn.Module):
    """A layer and what each adapter adds to it. `down` and `up` are by slot; an adapter may have nothing here.

    Where adapters sit, the layer's weight is not offered under its own name: code that multiplies by it past `forward`
    would leave them out, and fails instead. Where they only may come, it is, and `taken` tells.

    `name` and `shape` are the layer's as the model was loaded: surgery may move it and lay its weight out anew.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        weight = next(base.parameters())
        shape = weight_shape(base)
        assert shape is not None, "a layer that can be adapted"
        self.base = base
        self.name, self.shape, self.dtype = name, shape, weight.dtype
        self.taken = False
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        self._slots: dict[int, str] = {}  # a ParameterDict is keyed by texts

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "base":
                raise
            if name in ("weight", "bias"):
                if self._slots:
                    raise AttributeError(f"it takes the {name} of {self.name} without running it") from None
                self.taken = True
            return getattr(self.base, name)

    def fitted(self, delta: Delta, device: torch.device) -> Fitted:
        """As this layer multiplies by it: in its dtype, and a copy, since the file may be written anew."""

        def own(weight: Tensor) -> nn.Parameter:
            return nn.Parameter(weight.to(device, self.dtype, copy=True), requires_grad=False)

        return Fitted(own(self._down(delta)), own(self._up(delta)))

    def add(self, slot: int, fitted: Fitted) -> None:
        """Whole before it can be found: other slots may be run meanwhile."""
        self.down[str(slot)], self.up[str(slot)] = fitted
        self._slots[slot] = str(slot)

    @property
    def slots(self) -> Set[int]:
        return self._slots.keys()

    def drop(self, slot: int) -> None:
        """Nothing may ride on it any more."""
        key = self._slots.pop(slot, None)
        if key is not None:
            del self.down[key], self.up[key]

    def _down(self, delta: Delta) -> Tensor:
        return delta.down.contiguous()

    def _up(self, delta: Delta) -> Tensor:
        return delta.up.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        riders = _riding.get()
        if not any(slot in self._slots for slot, _, _ in riders):
            return out
        flat = out.reshape(-1, out.shape[-1])
        if riders[-1].end != len(flat):
            raise RuntimeError(
                f"a layer with adapters got {len(flat)} rows for a batch of {riders[-1].end}, whose they are is unknown"
            )
        rows = x.reshape(len(flat), -1)
        for slot, start, end in riders:
            key = self._slots.get(slot)
            if key is not None:
                low = self._lower(rows[start:end], self.down[key])
                flat[start:end].addmm_(low, self.up[key].T)
        return flat.view(out.shape)

    def _lower(self, rows: Tensor, down: Tensor) -> Tensor:
        raise NotImplementedError


class LoraLinear(_Adapted):
    """x [..., in] → [..., out]; over `nn.Linear` and transformers' Conv1D alike."""

    def _lower(self, rows: Tensor, down: Tensor) -> Tensor:
        """rows [n, in], down [r, in] → [n, r]"""
        return rows @ down.T


class LoraEmbedding(_Adapted):
    """ids [...] → [..., H]; `down` is kept as a table, [ids, r]."""

    def _down(self, delta: Delta) -> Tensor:
        return delta.down.T.contiguous()

    def _up(self, delta: Delta) -> Tensor:
        scale = getattr(self.base, "embed_scale", None)  # Gemma multiplies what it looks up
        return (delta.up if scale is None else delta.up * float(scale)).contiguous()

    def _lower(self, rows: Tensor, down: Tensor) -> Tensor:
        """rows int64 [n, 1], down [ids, r] → [n, r]"""
        return F.embedding(rows[:, 0], down)


def weight_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer that can be adapted, an embedding's being (H, ids); None for any other."""
    match layer:
        case _Adapted():
            return layer.shape
        case nn.Linear():
            return layer.out_features, layer.in_features
        case nn.Embedding():
            return layer.embedding_dim, layer.num_embeddings
        case Conv1D():
            return layer.nf, layer.nx
    return None


def adapted_layers(model: nn.Module) -> dict[str, _Adapted]:
    """Those that carry adapters, or may, by the names that they had when the model was loaded."""
    return {layer.name: layer for layer in model.modules() if isinstance(layer, _Adapted)}


@contextmanager
def idle_layers(model: nn.Module, slots: Collection[int] | None = None) -> Iterator[set[str]]:
    """The adapted layers that have not been called within this block, by name; a set that shrinks. With `slots`, those
    that have something of them.
    """
    layers = {
        name: layer
        for name, layer in adapted_layers(model).items()
        if slots is None or not layer.slots.isdisjoint(slots)
    }
    idle = set(layers)

    def called(name: str) -> Callable[..., None]:
        return lambda *_: idle.discard(name)

    hooks = [layer.register_forward_hook(called(name)) for name, layer in layers.items()]
    try:
        yield idle
    finally:
        for hook in hooks:
            hook.remove()


def attach(model: nn.Module, slot: int, deltas: Mapping[str, Delta]) -> None:
    """Put an adapter's deltas on the layers of these names, whose shapes are theirs. To be done before surgery."""
    device = next(model.parameters()).device
    for name, delta in deltas.items():
        layer = adapt(model, name)
        layer.add(slot, layer.fitted(delta, device))


def adapt(model: nn.Module, name: str) -> _Adapted:
    """The layer of this name, made one that adapters can sit on if it is not yet. To be done before surgery."""
    layer = model.get_submodule(name)
    if isinstance(layer, _Adapted):
        return layer
    adapted = LoraEmbedding(layer, name) if isinstance(layer, nn.Embedding) else LoraLinear(layer, name)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, adapted)
    return adapted


def adapt_all(model: nn.Module) -> None:
    """Every layer that adapters can sit on, for those that come later. To be done before surgery."""
    for name, layer in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        free = bool(name) and not isinstance(parent, _Adapted | nn.MultiheadAttention)
        # BART's table of positions, for one, is given more than ids.
        if free and weight_shape(layer) is not None and len(inspect.signature(layer.forward).parameters) == 1:
            adapt(model, name)


def give_back_taken(model: nn.Module) -> None:
    """Undo that for layers whose weight has been taken past `forward` since: surgery could not tell."""
    for name, layer in adapted_layers(model).items():
        if layer.taken:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)


@torch.no_grad()
def merge(layer: nn.Module, delta: Delta) -> None:
    """Add a delta to the weight of a layer that serves one adapter alone."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    full = delta.matrix()
    weight += (full if isinstance(layer, nn.Linear) else full.T).to(weight)


def base_layer(layer: Any) -> Any:
    """The layer itself, whether or not adapters sit on it; anything else as it is."""
    return layer.base if isinstance(layer, _Adapted) else layer
