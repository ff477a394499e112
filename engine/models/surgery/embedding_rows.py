"""What a BERT begins with, norm(word + position + type), in one pass over the rows instead of a dozen operations.

The module stays, with its tables under their names, since others look for them there; only its `forward` is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from carpool.engine.models.attention import layout
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.rehearsal import Given, Rehearsal, small_batch
from carpool.kernels import launch, native_rows
from carpool.kernels.twins_cpu import Norm

_SILENT = (nn.Dropout, nn.Identity)
Place = int | str  # of an argument: its number, or its name


class EmbeddingRows:
    """ids [1, T] → [1, T, H], called as the module is for which it stands in. A copy of that has one of its own."""

    def __init__(self, tables: Sequence[nn.Embedding], places: Sequence[Place], norm: nn.LayerNorm) -> None:
        """`places`: where among the module's arguments each table's ids are."""
        self._tables = list(tables)
        self._places = list(places)
        bias = None if norm.bias is None else norm.bias.detach().float()
        self._norm = Norm(norm.weight.detach().float(), bias, norm.eps, centred=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        ids = [args[place] if isinstance(place, int) else kwargs[place] for place in self._places]
        rows = native_rows.embed_rows([table.weight for table in self._tables], ids, self._norm)
        return rows.view(*ids[0].shape, -1)


def sum_rows(backbone: Backbone, *, vocab_size: int) -> int:
    """Put one into every module that does nothing else; returns how many."""
    model = backbone.module
    if backbone.packing == "padded" or not any(map(_may_be, model.modules())):
        return 0
    batch = small_batch(vocab_size, next(model.parameters()).device)
    count = 0
    with torch.inference_mode(False), torch.no_grad():
        rehearsal = Rehearsal.of(model, lambda: backbone.forward(batch), scene=lambda: layout(batch))
        for path, module in model.named_modules():
            if _may_be(module) and (found := _found(path, module, rehearsal)) is not None:
                own = vars(module)
                count += rehearsal.holds(
                    path,
                    module,
                    partial(own.__setitem__, "forward", found),
                    partial(own.pop, "forward", None),
                )
    return count


def _may_be(module: nn.Module) -> bool:
    """Whether it holds tables, one LayerNorm over rows that are served natively, and nothing else that computes."""
    children = [child for child in module.children() if not isinstance(child, _SILENT)]
    tables = [child for child in children if type(child) is nn.Embedding]
    norms = [child for child in children if type(child) is nn.LayerNorm and child.weight is not None]
    return (
        bool(tables)
        and len(norms) == 1
        and len(tables) + 1 == len(children)
        and "forward" not in vars(module)
        and not launch.backend.serves(tables[0].weight.device)
        and all(native_rows.serves(table.weight) and table.max_norm is None for table in tables)
        and not list(module.parameters(recurse=False))
    )


def _found(path: str, module: nn.Module, rehearsal: Rehearsal) -> EmbeddingRows | None:
    """None unless all that its tables were asked for was given to it."""
    given = rehearsal.given.get(path)
    if given is None:
        return None
    tables, places = [], []
    for name, child in module.named_children():
        asked = rehearsal.given.get(f"{path}.{name}" if path else name)
        if asked is None or not isinstance(child, nn.Embedding):
            continue
        place = _place(given, asked.args[0] if asked.args else None)
        if place is None:
            return None
        tables.append(child)
        places.append(place)
    (norm,) = (child for child in module.children() if isinstance(child, nn.LayerNorm))
    return EmbeddingRows(tables, places, norm) if tables else None


def _place(given: Given, ids: Tensor | None) -> Place | None:
    """Where among the arguments it was."""
    places: list[tuple[Place, Any]] = [*enumerate(given.args), *given.kwargs.items()]
    return next((place for place, arg in places if arg is ids and ids is not None), None)
