"""Pooler: hidden states of a packed batch to one result a sequence, whatever mix of tasks rides in it.

Each task has a pool: a method (which rows) and the heads behind it (what becomes of them). All of it is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from carpool.engine.packing import PackedBatch, places_of
from carpool.engine.params import Task
from carpool.engine.sequence import Sequence
from carpool.engine.staging import upload

Row = NDArray[Any]  # float32, or the 16 bits that an embedding was asked for in
Rows = list[Row]
Reads = Literal["first", "last", "all"]  # which tokens of a text


@dataclass(frozen=True, slots=True)
class Pooled:
    """Results that may still be on a device, or yet to be computed there.

    `unpack` takes the `tensors` as arrays, in their order, and gives one result a sequence. The tensors are new ones: a
    backbone may use its own again before these are read.
    """

    tensors: tuple[Tensor, ...]
    unpack: Callable[[Seq[Row]], Rows]

    def then(self, change: Callable[[Rows], Rows]) -> Pooled:
        """The same, with `change` made to the results on the host."""
        return Pooled(self.tensors, lambda arrays: change(self.unpack(arrays)))


def together(parts: Seq[tuple[Seq[int], Pooled]]) -> Pooled:
    """Several as one. Each part comes with the numbers of its results among all, which count from 0."""

    def unpack(arrays: Seq[Row]) -> Rows:
        left = iter(arrays)
        results: dict[int, Row] = {}
        for numbers, pooled in parts:
            own = list(islice(left, len(pooled.tensors)))
            results.update(zip(numbers, pooled.unpack(own), strict=True))
        return [results[i] for i in range(len(results))]

    return Pooled(tuple(chain.from_iterable(pooled.tensors for _, pooled in parts)), unpack)


class Pool(Protocol):
    """Serves one task for the sequences of a batch that ask for it."""

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        """hidden [T, H]; the hidden states of `sequences[i]` are those at `places[i]` of the B in `packed`.

        One result each: [D] for a whole text, [tokens, D] for a token task. A pool does not make the host wait for a
        device: what it has to know of the batch, the host knows.
        """


@runtime_checkable
class Dealer(Protocol):
    """A pool over several, one an adapter that brings a head of its own."""

    def add(self, slot: int, pool: Pool) -> None: ...

    def drop(self, slot: int) -> None: ...


def reads(pool: Pool) -> Reads:
    """Which hidden states of a text its result is made of; all, for pools that do not say.

    The first are those behind what is skipped.
    """
    said: Reads = getattr(pool, "reads", "all")
    return said


class Pooler:
    """Deals the sequences of a batch out to their tasks' pools."""

    def __init__(self, pools: Mapping[Task, Pool]) -> None:
        self._pools = pools

    def add(self, slot: int, pools: Mapping[Task, Pool]) -> None:
        """The pools of an adapter's own head, for a model whose pools deal out to those."""
        for task, pool in pools.items():
            dealer = self._pools[task]
            assert isinstance(dealer, Dealer), "a model that was loaded for adapters to come"
            dealer.add(slot, pool)

    def drop(self, slot: int) -> None:
        """Nothing may ride on it any more."""
        for pool in self._pools.values():
            if isinstance(pool, Dealer):
                pool.drop(slot)

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, sequences: Seq[Sequence], places: Seq[int]
    ) -> Pooled:
        """`places` as a Pool has them: sequences that ask several things of one text share its hidden states."""
        parts = []
        for task, pool in self._pools.items():
            asking = [i for i, seq in enumerate(sequences) if seq.task == task]
            if asking:
                own = [places[i] for i in asking], [sequences[i] for i in asking]
                parts.append((asking, pool(hidden, packed, *own)))
        return together(parts)

    def wanted(
        self, bounds: Seq[int], sequences: Seq[Sequence], places: Seq[int]
    ) -> NDArray[np.int64] | None:
        """All that will be read of a row whose sequences have these bounds: int64 [R], in order.

        None for the whole row: if anything beside first and last tokens is read, or there is nothing else in it.
        """
        what = {task: reads(pool) for task, pool in self._pools.items()}
        found = set()
        for seq, place in zip(sequences, places, strict=True):
            if what[seq.task] == "last":
                found.add(bounds[place + 1] - 1)
            elif what[seq.task] == "first" and not seq.skip:
                found.add(bounds[place])
            else:
                return None
        return np.array(sorted(found), np.int64) if len(found) < bounds[-1] else None


def is_whole(places: Seq[int], count: int) -> bool:
    """Whether these are all of `count` sequences, in their order."""
    return len(places) == count and all(map(int.__eq__, places, range(count)))


def token_rows(hidden: Tensor, packed: PackedBatch, places: Seq[int]) -> tuple[Tensor, list[int]]:
    """The rows of the sequences at `places`, [R, H] in hidden's dtype, and how many each has."""
    lengths = packed.lengths
    if is_whole(places, len(lengths)):
        return hidden, lengths
    (rows,) = upload(hidden.device, places_of(packed.bounds, places))
    return hidden[rows], [lengths[i] for i in places]


def split(rows: Row, lengths: Seq[int]) -> Rows:
    """Views of `rows` [sum(lengths), ...], one of each length."""
    return np.split(rows, np.cumsum(lengths)[:-1])
