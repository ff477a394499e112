"""PackedLayer: what a class is that a patch gives to a layer.

A class is swapped and no function is bound to the layer: a copy of the layer, as each replica has one, then runs on
its own state and on nothing of the original's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class PackedLayer:
    """Stands first among the bases of a packed class, before the stock class whose modules it is for."""


def stock_class(packed: type[Any]) -> type[Any]:
    """The class of transformers that a packed class is for."""
    return next(kind for kind in packed.__mro__ if not issubclass(kind, PackedLayer))


def become(backbone: nn.Module, packed: Iterable[type[Any]]) -> None:
    """Every module of exactly a stock class of one of these becomes that one."""
    by_stock = {stock_class(kind): kind for kind in packed}
    for module in backbone.modules():
        if kind := by_stock.get(type(module)):
            module.__class__ = kind
