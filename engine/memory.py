"""HeapTrimmer: gives memory that batches have freed back to the system.

Batches differ in size, so their freed buffers leave holes that glibc keeps: under mixed traffic a server of MiniLM
grows from 0.5 to 1 GB within minutes, and stays below 0.8 GB with a trim every two seconds (docs/log.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_EVERY_S = 2.0


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
