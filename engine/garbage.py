"""Garbage: Python's collector, put off while modules are imported.

torch and transformers are some 700,000 objects. While they come to be nothing is freed, and the collector looks at all
of them time and again: a tenth of what starting takes (docs/log.md).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off() -> Iterator[None]:
    """No collection within this block; what it has made counts as old afterwards, and so is looked at seldom.

    But it is looked at: to freeze it would also freeze what is the caller's, and that would never be freed when it
    becomes garbage. A server may freeze, since all is its own; a library may not.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else this would thaw what somebody has frozen
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, without a look at it
        gc.enable()
