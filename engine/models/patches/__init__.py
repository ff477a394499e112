"""Patches: attention of classes that bypass transformers' registry, done on a packed row.

A row names a model class and what to do to a loaded module of it, in place: the same weights and the same module
tree, with the forward of some modules replaced. The isolation probe decides afterwards, as for any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

Patch = Callable[[nn.Module], None]

PATCHES: Mapping[str, Patch] = {}  # by the name of the backbone's class


def patch(backbone: nn.Module) -> bool:
    """Apply the patch of this class, if there is one."""
    apply = PATCHES.get(type(backbone).__name__)
    if apply is not None:
        apply(backbone)
    return apply is not None
