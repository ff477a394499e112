"""AdaptedPool: a task whose head is not the same for every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from torch import Tensor

from carpool.engine.packing import PackedBatch
from carpool.engine.poolers.pooler import Pool, Pooled, Reads, reads, together
from carpool.engine.sequence import Sequence


class AdaptedPool:
    """`pools` by adapter; 0 is for all that bring no head of their own."""

    def __init__(self, pools: Mapping[int, Pool]) -> None:
        self._pools = pools

    @property
    def reads(self) -> Reads:
        """What all of them read; all, if they differ."""
        first, *others = set(map(reads, self._pools.values()))
        return "all" if others else first

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        parts = []
        served_by = [seq.adapter if seq.adapter in self._pools else 0 for seq in sequences]
        for adapter, pool in self._pools.items():
            mine = [i for i, own in enumerate(served_by) if own == adapter]
            if mine:
                own = [places[i] for i in mine], [sequences[i] for i in mine]
                parts.append((mine, pool(hidden, packed, *own)))
        return together(parts)
