"""All layers of a model as one native call, where each is an `EncoderLayer` or `GatedLayer` of native products.

Of a short text the steps between the products take longer than they do, and while Python goes through them it keeps
other threads, the event loop's among them, from running (docs/log.md). Results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from carpool.engine.models.attention import NUMBER, under_way, watched
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.agreement import holds
from carpool.engine.models.surgery.encoder_layer import EncoderLayer, answer_alike
from carpool.engine.models.surgery.gated_layer import Angles, GatedLayer, angles_of
from carpool.engine.models.surgery.last_layer import narrowed
from carpool.engine.models.surgery.rehearsal import small_batch
from carpool.kernels import native_encoder
from carpool.kernels.layout import Kept

_NOTED = "_carpool_angles"  # the hidden states' attribute: angles of the layers before the Encoder


class Note(nn.Module):
    """Stands where a layer stood that is turned by other angles than the Encoder is given, and keeps them for it."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        setattr(hidden, _NOTED, [*getattr(hidden, _NOTED, ()), angles_of(args, kwargs)])
        return hidden


class Encoder(nn.Module):
    """hidden [1, T, H] → [1, T, H], as `layers` one after the other. It stands last in their list, behind Notes."""

    def __init__(
        self, layers: nn.ModuleList, run: native_encoder.Encoder, sources: Sequence[int | None]
    ) -> None:
        """`sources`: for each layer that is turned, the place in the list at which its angles are given."""
        super().__init__()
        self.layers = layers
        self.run = run  # no module: a copy of the model has the same
        self.sources = tuple(sources)
        self.tables = sorted({source for source in sources if source is not None})

    def forward(
        self, hidden: Tensor, *args: Any, position_bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        row = under_way()
        bias = None if position_bias is None else position_bias.float().contiguous()
        angles = self._angles(hidden, args, kwargs)
        kept = None if row.kept is None else self._kept(row.kept)
        if not (row.unseen or watched()) and (row.kept is None or kept is not None):
            last: Any = self.layers[-1]
            wanted = row.wanted if row.wanted is not None and narrowed(*last.behind) else None
            tables = [(cosines[0], sines[0]) for cosines, sines in angles.values()]
            return self.run(hidden[0], row.runs, tables, kept, wanted, bias=bias)[None]
        for layer, source in zip(self.layers, self.sources, strict=True):
            told = () if source is None else (angles[source],)
            hidden = layer(hidden, *told, position_bias=bias)
        return hidden

    def _kept(self, kept: Kept) -> Kept | None:
        """The same, of these layers alone; None if they have no pages."""
        numbers = [getattr(layer, NUMBER, None) for layer in self.layers]
        own = [kept.layers[number] for number in numbers if number is not None]
        return replace(kept, layers=tuple(own)) if len(own) == len(numbers) else None

    def _angles(self, hidden: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[int, Angles]:
        """By place, float32."""
        if not self.tables:
            return {}
        given = [*vars(hidden).pop(_NOTED, ()), angles_of(args, kwargs)]
        pairs = {place: given[place] for place in self.tables}
        return {
            place: (one.float().contiguous(), two.float().contiguous()) for place, (one, two) in pairs.items()
        }


def unite(backbone: Backbone, *, vocab_size: int) -> int:
    """Swap every list of such layers for one of these, in place; returns how many were. For after `straighten`."""
    model = backbone.module
    lists = [(path, module) for path, module in model.named_modules() if _is_of_layers(module)]
    weight = next(model.parameters())
    if not lists or weight.device.type != "cpu":
        return 0
    batch = small_batch(vocab_size, weight.device)
    turned: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(partial(_hear, turned), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, GatedLayer) and module.turns
    ]
    with torch.inference_mode(False), torch.no_grad():
        try:
            before = backbone.forward(batch)
        finally:
            for hook in hooks:
                hook.remove()
        found = [(path, layers, _united(layers, turned, weight.dtype)) for path, layers in lists]
        if not any(united for _, _, united in found):
            return 0
        _put(model, [(path, united or layers) for path, layers, united in found])
        if holds(lambda: backbone.forward(batch), before, torch.equal):
            return sum(united is not None for _, _, united in found)
    _put(model, [(path, layers) for path, layers, _ in found])
    return 0


def _is_of_layers(module: nn.Module) -> TypeGuard[nn.ModuleList]:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 1
        and all(isinstance(layer, (EncoderLayer, GatedLayer)) and layer.described(None) for layer in module)
    )


def _hear(
    turned: dict[nn.Module, Tensor], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    turned[layer], _ = angles_of(args, kwargs)


def _put(model: nn.Module, lists: list[tuple[str, nn.ModuleList]]) -> None:
    for path, layers in lists:
        above, _, name = path.rpartition(".")
        setattr(model.get_submodule(above), name, layers)


def _united(
    layers: nn.ModuleList, turned: Mapping[nn.Module, Tensor], dtype: torch.dtype
) -> nn.ModuleList | None:
    """The list that takes their place; `turned` has the cosines that each layer was given, if it minds any."""
    places: dict[int, int] = {}  # by cosines: the first layer that was given them
    sources = [
        places.setdefault(id(turned[layer]), place) if layer in turned else None
        for place, layer in enumerate(layers)
    ]
    tables = sorted(places.values())
    described = [
        layer.described(None if source is None else tables.index(source))  # type: ignore[operator]
        for layer, source in zip(layers, sources, strict=True)
    ]
    if None in described:
        return None
    try:
        run = native_encoder.Encoder(described, dtype)
    except ValueError:  # they do not fit each other
        return None
    united = nn.ModuleList([*(Note() for _ in range(max(tables, default=0))), Encoder(layers, run, sources)])
    for new, old in zip(united, layers, strict=False):
        answer_alike(new, old)
    return united
