"""Threads: over how many of them torch spreads one operation while a model is loaded and checked.

The checks are small, and at the end of each operation torch's threads wait for one another in a loop. Where other work
or a container's quota leaves fewer cores than there are threads, such a wait lasts until the system has given each its
turn, and loading takes several times as long (docs/log.md). The operations of a large model gain by being spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from carpool.engine.cores import Cores

_BYTES = 256 << 20  # of weights, for each thread: below, one core streams them in no time


@contextmanager
def spread(folder: Path) -> Iterator[None]:
    """Within this block an operation of this thread is spread as suits the weights in `folder`.

    Never over more threads than it was, nor than there are cores to be had.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, Cores.here().workers, max(1, _size(folder) // _BYTES)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _size(folder: Path) -> int:
    """Bytes of the weights, as `models.weights.stored` finds them."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)
