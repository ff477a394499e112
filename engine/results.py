"""Results: rows that are kept for prompts that come again, and the names under which they are found. Pure."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import astuple
from functools import lru_cache
from hashlib import blake2b
from struct import Struct
from typing import TYPE_CHECKING, Any

from carpool.engine.cache.hashing import encoded
from carpool.engine.stats import ResultStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from carpool.engine.params import PoolingParams, Task
    from carpool.engine.prepared import Prepared

_DIGEST_BYTES = (
    32  # nobody finds two prompts of one digest: that would be one client's row for another's prompt
)
_PLACES = Struct("<qq")  # type_start and unseen, -1 for nowhere
_ENTRY_BYTES = 512  # what Python takes for a row beside its numbers: the key, the array object, their places


def result_keys(
    prepared: Prepared, tasks: Seq[Task], params: PoolingParams, adapter: int = 0, salt: str | None = None
) -> list[bytes]:
    """A name for each row that is asked for: task by task of the first prompt, then of the next.

    Equal names mean equal rows: all that a row depends on is in its name, and the `salt`, which keeps clients apart.
    Takes a few microseconds a prompt.
    """
    common = _common(params, adapter, salt, prepared.skip)
    nowhere: list[int | None] = [None] * len(prepared.token_ids)
    starts, unseen = prepared.type_starts or nowhere, prepared.unseen or nowhere
    names = [task.encode() for task in tasks]
    keys = []
    for ids, start, end in zip(prepared.token_ids, starts, unseen, strict=True):
        own = common.copy()
        own.update(_PLACES.pack(-1 if start is None else start, -1 if end is None else end))
        own.update(array("i", ids))
        digest = own.digest()
        keys += [digest + name for name in names]
    return keys


@lru_cache(maxsize=256)
def _common(params: PoolingParams, adapter: int, salt: str | None, skip: int) -> blake2b:
    """What all rows of a request depend on, to be copied: few requests differ from the last ones in any of it."""
    return blake2b(encoded((*astuple(params), adapter, salt, skip)), digest_size=_DIGEST_BYTES)


class Results:
    """The rows that were asked for last, in at most `max_bytes`; none where that is 0.

    Rows are copied when they come, so that no batch is kept for the sake of one of its rows, and can be read only.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, NDArray[Any]] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._hits = 0
        self._misses = 0

    @property
    def stats(self) -> ResultStats | None:
        """None where nothing is kept."""
        if not self._max_bytes:
            return None
        return ResultStats(self._hits, self._misses, self._num_bytes, self._max_bytes)

    def find(self, keys: Seq[bytes]) -> list[NDArray[Any] | None]:
        """The row of each key, None for those that have to be run."""
        if not self._max_bytes:
            return [None] * len(keys)
        rows = [self._rows.get(key) for key in keys]
        for key, row in zip(keys, rows, strict=True):
            if row is not None:
                self._rows.move_to_end(key)
        missing = sum(row is None for row in rows)
        self._hits += len(rows) - missing
        self._misses += missing
        return rows

    def forget(self) -> None:
        self._rows.clear()
        self._num_bytes = 0

    def keep(self, key: bytes, row: NDArray[Any]) -> None:
        """In place of those that were not asked for longest. A row that is larger than the whole is not kept."""
        size = row.nbytes + _ENTRY_BYTES
        if size > self._max_bytes or key in self._rows:
            return
        while self._num_bytes + size > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._num_bytes -= oldest.nbytes + _ENTRY_BYTES
        own = row.copy()
        own.flags.writeable = False
        self._rows[key] = own
        self._num_bytes += size
