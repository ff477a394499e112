"""Memory that batches leave behind: what is kept of it, and what goes back to the system.

Batches differ in size, so their freed buffers leave holes that glibc keeps: under mixed traffic a server of MiniLM
grows from 0.5 to over 1 GB within minutes, and to 0.85 GB with what this file does (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_EVERY_S = 1.0
_PRIMITIVES = "16"  # a batch needs a handful at a time, and the next batch, of another length, needs others


def bound_primitive_cache() -> None:
    """oneDNN keeps compiled code for the last 1,024 shapes it met, some 100 KB each; nearly every batch is a new shape.

    It reads the environment at its first operation, so this comes before; a value that is set already is left.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRIMITIVES)


def _find_trim() -> Callable[[int], object] | None:
    """glibc's malloc_trim, which frees the GIL meanwhile; other C libraries have none and need none."""
    trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class HeapTrimmer:
    """For one thread: `rest(now)` trims if the last time was long enough ago."""

    def __init__(self, trim: Callable[[int], object] | None = None) -> None:
        self._trim = trim or _find_trim()
        self._due = 0.0

    def rest(self, now: float) -> None:
        """`now` in seconds, on any clock."""
        if self._trim is not None and now >= self._due:
            self._trim(0)
            self._due = now + _EVERY_S
