"""AdaptedPool: each sequence meets the head of its own adapter."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from asking import packed_of, read
from carpool.engine.packing import PackedBatch
from carpool.engine.params import PoolingParams
from carpool.engine.poolers.adapted import AdaptedPool
from carpool.engine.poolers.pooler import Pooled, Reads
from carpool.engine.sequence import Sequence

HIDDEN = torch.zeros(9, 4)
PACKED = packed_of(HIDDEN, [3, 3, 3])


class Names:
    """A pool that answers with its own number and what it was asked."""

    def __init__(self, number: int, reads: Reads = "all") -> None:
        self.number = number
        self.reads = reads

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        assert hidden is HIDDEN
        assert packed is PACKED
        rows = [[self.number, place, seq.index] for place, seq in zip(places, sequences, strict=True)]
        return Pooled((torch.tensor(rows),), lambda arrays: list(arrays[0]))


def test_each_sequence_meets_its_own_head() -> None:
    """Adapter 1 brings none; results come back in order, at the places they were asked for."""
    pool = AdaptedPool({0: Names(0), 2: Names(2), 3: Names(3)})
    adapters = [2, 0, 3, 1, 2]
    sequences = [Sequence(0, i, [7], PoolingParams(), adapter=adapter) for i, adapter in enumerate(adapters)]
    places = [2, 0, 1, 0, 1]
    rows = [row.tolist() for row in read(pool(HIDDEN, PACKED, places, sequences))]
    assert rows == [[2, 2, 0], [0, 0, 1], [3, 1, 2], [0, 0, 3], [2, 1, 4]]


def test_it_reads_what_all_of_its_pools_do() -> None:
    assert AdaptedPool({0: Names(0, "last"), 1: Names(1, "last")}).reads == "last"
    assert AdaptedPool({0: Names(0, "first"), 1: Names(1, "last")}).reads == "all"
    assert AdaptedPool({0: Names(0, "first"), 1: Names(1)}).reads == "all"
