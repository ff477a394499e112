"""A pool asked by hand: hidden states made up, no backbone."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from carpool.engine.packing import PackedBatch, pack_ids
from carpool.engine.poolers.pooler import Pool, Pooled, Rows
from carpool.engine.sequence import Sequence
from carpool.engine.staging import carrier


def packed_of(hidden: Tensor, lengths: Seq[int]) -> PackedBatch:
    """Where texts of these lengths lie; their ids are nobody's."""
    return pack_ids([[1] * length for length in lengths], hidden.device)


def ask(pool: Pool, hidden: Tensor, lengths: Seq[int], places: Seq[int], sequences: Seq[Sequence]) -> Rows:
    """hidden [T, H] of texts of these lengths → what the host gets."""
    return read(pool(hidden, packed_of(hidden, lengths), places, sequences))


def read(pooled: Pooled) -> Rows:
    device = pooled.tensors[0].device
    return pooled.unpack(carrier(device).send_for(pooled.tensors)())
