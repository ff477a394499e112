"""Garbage: how Python's collector is set for a process that serves from now on."""

from __future__ import annotations

import gc

# New objects before a young collection. Requests leave next to no cycles behind, and at Python's 700 looking for them
# took 3 to 8 % of a request (docs/log.md).
NEW_OBJECTS = 10_000


def settle() -> None:
    """All there is by now is here to stay: later collections skip it, and come seldom."""
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
