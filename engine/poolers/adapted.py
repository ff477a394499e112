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

    def add(self, slot: int, pool: Pool) -> None:
        """From the next batch on; one under way in another thread keeps those that it has."""
        self._pools = {**self._pools, slot: pool}

    def drop(self, slot: int) -> None:
        """Nothing may ride on it any more."""
        self._pools = {own: pool for own, pool in self._pools.items() if own != slot}

    @property
    def reads(self) -> Reads:
        """What all of them read; all, if they differ."""
        first, *others = set(map(reads, self._pools.values()))
        return "all" if others else first

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        parts, pools = [], self._pools
        served_by = [seq.adapter if seq.adapter in pools else 0 for seq in sequences]
        for adapter in dict.fromkeys(served_by):
            mine = [i for i, own in enumerate(served_by) if own == adapter]
            own = [places[i] for i in mine], [sequences[i] for i in mine]
            parts.append((mine, pools[adapter](hidden, packed, *own)))
        return together(parts)
