"""Packing: a Batch becomes one packed row of tensors. No padding anywhere."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carpool.engine.batch import Batch
from carpool.engine.staging import upload


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """`B` sequences end to end: `T` tokens.

    input_ids and position_ids int64 [T]; cu_seqlens int32 [B+1], the cumulative lengths from 0, which `bounds` are on
    the host; `runs` are the (length, count) of neighbouring sequences of equal length; `adapters` are the sequences'
    own, () for all 0. `unseen` are from where on each sequence's tokens are not looked at, () for nowhere; `seen` int32
    [B] says it to a device: how many of each are looked at, None where all are.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    token_type_ids: Tensor | None = None  # None is type 0 throughout
    adapters: tuple[int, ...] = ()
    unseen: tuple[int | None, ...] = ()
    seen: Tensor | None = None

    @property
    def max_seqlen(self) -> int:
        return max(length for length, _ in self.runs)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [end - start for start, end in pairwise(self.bounds)]


def pack(batch: Batch, device: torch.device) -> PackedBatch:
    """Lay the batch's sequences end to end, in its order."""
    starts = [seq.type_start for seq in batch.sequences]
    adapters = [seq.adapter for seq in batch.sequences]
    unseen = [seq.unseen for seq in batch.sequences]
    return pack_ids([seq.token_ids for seq in batch.sequences], device, starts, adapters, unseen)


def pack_ids(
    token_ids: list[list[int]],
    device: torch.device,
    type_starts: list[int | None] | None = None,
    adapters: list[int] | None = None,
    unseen: Seq[int | None] = (),
) -> PackedBatch:
    """Lay lists of ids end to end, in the order given. From `type_starts[i]` on, tokens of i are of type 1."""
    lengths = [len(ids) for ids in token_ids]
    bounds = tuple(accumulate(lengths, initial=0))
    ids = np.fromiter(chain.from_iterable(token_ids), np.int64, bounds[-1])
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
    types: list[NDArray[np.int64]] = []
    seen: list[NDArray[np.int32]] = []
    if type_starts is not None and any(start is not None for start in type_starts):
        split = [
            length if start is None else start for start, length in zip(type_starts, lengths, strict=True)
        ]
        types = [(positions >= np.repeat(split, lengths)).astype(np.int64)]
    if any(place is not None for place in unseen):
        counts = [length if place is None else place for place, length in zip(unseen, lengths, strict=True)]
        seen = [np.array(counts, np.int32)]
    input_ids, position_ids, cu_seqlens, *others = upload(
        device, ids, positions, np.array(bounds, np.int32), *types, *seen
    )
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        bounds=bounds,
        runs=_runs(lengths),
        token_type_ids=others[0] if types else None,
        adapters=tuple(adapters) if adapters and any(adapters) else (),
        unseen=tuple(unseen) if seen else (),
        seen=others[-1] if seen else None,
    )


def select(batch: PackedBatch, chosen: Seq[int]) -> tuple[PackedBatch, Tensor]:
    """These sequences of a batch as one of their own, in the order given; int64 [T]: where their tokens came from."""
    lengths = batch.lengths
    own = [lengths[i] for i in chosen]
    bounds = tuple(accumulate(own, initial=0))
    places, order, cu_seqlens = upload(
        batch.input_ids.device,
        places_of(batch.bounds, chosen),
        np.array(chosen, np.int64),
        np.array(bounds, np.int32),
    )
    types, seen = batch.token_type_ids, batch.seen
    return (
        PackedBatch(
            input_ids=batch.input_ids[places],
            position_ids=batch.position_ids[places],
            cu_seqlens=cu_seqlens,
            bounds=bounds,
            runs=_runs(own),
            token_type_ids=None if types is None else types[places],
            adapters=tuple(batch.adapters[i] for i in chosen) if batch.adapters else (),
            unseen=tuple(batch.unseen[i] for i in chosen) if batch.unseen else (),
            seen=None if seen is None else seen[order],
        ),
        places,
    )


def places_of(bounds: Seq[int], chosen: Seq[int]) -> NDArray[np.int64]:
    """Where in a packed row the tokens of the chosen sequences are, in the order given."""
    return spans([(bounds[i], bounds[i + 1]) for i in chosen])


def spans(pieces: Seq[tuple[int, int]]) -> NDArray[np.int64]:
    """The whole numbers of each piece, from its start to before its end, one piece after the other."""
    starts, ends = np.array(pieces, np.int64).reshape(-1, 2).T
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    places: NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return places


def _runs(lengths: Seq[int]) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(list(same))) for length, same in groupby(lengths))
