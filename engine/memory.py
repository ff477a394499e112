"""Memory that batches leave behind: what is kept of it, and what goes back to the system.

Batches differ in size, so their freed buffers leave holes that glibc keeps: under mixed traffic a server of MiniLM
grows from 0.5 to over 1 GB within minutes without what this file does (docs/log.md; with it, docs/operations.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_EVERY_S = 5.0  # a trim costs 1 to 3 ms, and as much again when batches come to need what it gave back
_PRIMITIVES = "16"  # a batch needs a handful at a time, and the next batch, of another length, needs others


def bound_primitive_caches() -> None:
    """oneDNN keeps compiled code for the last 1,024 shapes it met, some 100 KB each, and torch's layer above it does so
    once more, in each thread, 280 KB each; nearly every batch is a new shape.

    They read the environment at their first operation, so this comes before; a value that is set already is left.
    """
    for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(capacity, _PRIMITIVES)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them
_FROM_SYSTEM = 32 << 20  # bytes, the largest that glibc takes: buffers below are cut from a heap
_KEPT = 256 << 20  # bytes free at a heap's end before it shrinks by itself
_TOLD = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_buffers() -> None:
    """Have malloc keep what a batch frees for the next one, until it is trimmed.

    By itself glibc gives large buffers and a heap's free end back at once, and every batch has their pages zeroed and
    mapped anew. To be called when the model is loaded: weights come and go once. Who has told malloc otherwise in the
    environment is not overruled.
    """
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _TOLD):
        mallopt(_M_MMAP_THRESHOLD, _FROM_SYSTEM)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def _find_trim() -> Callable[[int], object] | None:
    """glibc's malloc_trim, which frees the GIL meanwhile; other C libraries have none and need none."""
    trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class HeapTrimmer:
    """`rest(now)` trims if the last time was long enough ago; by whichever thread, it is for all of them."""

    def __init__(self, trim: Callable[[int], object] | None = None) -> None:
        self._trim = trim or _find_trim()
        self._due = 0.0

    def rest(self, now: float) -> None:
        """`now` in seconds, on any clock."""
        if self._trim is not None and now >= self._due:
            self._due = now + _EVERY_S  # first: others come by while it trims
            self._trim(0)


heap = HeapTrimmer()  # the process has one: what is trimmed is what all of its threads left
