"""The Python face of kernels/cpu/crew.cpp: cores on which nobody computes help with the native kernels' calls.

The twin is doing without: results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from carpool.kernels import native


def hire(cores: int) -> int:
    """At most so many threads are to compute at once from now on, who leads and who helps; how many it were before."""
    return int(native.library.carpool_crew_hire(cores)) if native.library is not None else 1


def helped() -> int:
    """Parts of calls that others than the caller computed, since the process began."""
    return int(native.library.carpool_crew_helped()) if native.library is not None else 0


@contextmanager
def leading() -> Iterator[None]:
    """While this thread computes a batch: its calls are helped with, and helpers leave it its core."""
    if native.library is None:
        yield
        return
    native.library.carpool_crew_lead(1)
    try:
        yield
    finally:
        native.library.carpool_crew_lead(-1)
