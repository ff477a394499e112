"""Leaves: a model's linear layers, each alone or with the GELU behind it, replaced by what multiplies faster."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from carpool.engine.models.surgery.activation import Gelu
from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.linear_gelu import LinearGelu
from carpool.engine.models.surgery.rehearsal import Likeness, Rehearsal, submodule

# From a layer's path in the model, the layer and its GELU: what takes its place, or None to leave it as it is.
Make = Callable[[str, nn.Linear, Gelu | None], nn.Module | None]


def replace_linears(
    model: nn.Module,
    rehearsal: Rehearsal,
    make: Make,
    likeness: Likeness = agree,
) -> tuple[int, int]:
    """In place; returns how many linear layers alone and how many with a GELU were replaced.

    Only layers of exactly nn.Linear's class: a subclass computes something more. And only where the module that holds
    them runs as before, to `likeness`: some multiply by a layer's weight themselves, past the layer.
    """
    alone = with_gelu = 0
    for path in [path for path, _ in model.named_modules()]:
        parent = submodule(model, path)
        if parent is None or isinstance(parent, LinearGelu):  # that is replaced as a whole
            continue
        new: dict[str, nn.Module] = {}
        gelus = 0
        for name, child in parent.named_children():
            linear, gelu = (child.linear, child.gelu) if isinstance(child, LinearGelu) else (child, None)
            made = make(f"{path}.{name}", linear, gelu) if type(linear) is nn.Linear else None
            if made is not None:
                new[name] = made
                gelus += gelu is not None
        if not new:
            continue
        if (
            path not in rehearsal.given
        ):  # an expert that no token went to, a list: its layers were checked one by one
            for name, made in new.items():
                setattr(parent, name, made)
        elif not rehearsal.swap(path, parent, new, likeness):
            continue
        alone, with_gelu = alone + len(new) - gelus, with_gelu + gelus
    return alone, with_gelu
