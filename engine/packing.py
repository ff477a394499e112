"""Packing: a Batch becomes one packed row of tensors. No padding anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carpool.engine.batch import Batch
from carpool.engine.cache.storage import Storage
from carpool.engine.staging import upload
from carpool.kernels.layout import Kept, Layout, Past


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """`B` sequences end to end: `T` tokens.

    input_ids and position_ids int64 [T]; cu_seqlens int32 [B+1], the cumulative lengths from 0, which `bounds` are on
    the host; `runs` are the (length, count) of neighbouring sequences of equal length; `adapters` are the sequences'
    own, () for all 0. `unseen` are from where on each sequence's tokens are not looked at, () for nowhere; `seen` int32
    [B] says it to a device: how many of each are looked at, None where all are. `kept`: where keys and values are kept,
    None if none are; of a sequence that has a past the row holds its next tokens, and their positions go on from there.
    `wanted` int64 [R]: the tokens whose hidden states will be read, None for all; others may come out as NaN.
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
    kept: Kept | None = None
    wanted: Tensor | None = None

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


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a row leaves in `storage`, and finds there.

    `blocks` of each sequence, in order, None for those of which nothing is kept; `pasts`: how many tokens of each are
    there before those in the row. Those that have a past come last.
    """

    storage: Storage
    blocks: Seq[Seq[int] | None]
    pasts: Seq[int]


def pack(batch: Batch, device: torch.device, storage: Storage | None = None) -> PackedBatch:
    """Lay what runs of the batch's sequences end to end, in its order. `storage` is for those that have a table."""
    sequences = batch.sequences
    keeping = None
    ids = [seq.token_ids for seq in sequences]
    if batch.is_paged:
        assert storage is not None, "tables are for those who have a storage"
        pasts = [seq.computed for seq in sequences]
        keeping = Keeping(
            storage, [None if seq.table is None else seq.table.blocks for seq in sequences], pasts
        )
        ids = [own[past : past + count] for own, past, count in zip(ids, pasts, batch.counts, strict=True)]
    return pack_ids(
        ids,
        device,
        [seq.type_start for seq in sequences],
        [seq.adapter for seq in sequences],
        [seq.unseen for seq in sequences],
        keeping,
    )


def pack_ids(
    token_ids: list[list[int]],
    device: torch.device,
    type_starts: list[int | None] | None = None,
    adapters: list[int] | None = None,
    unseen: Seq[int | None] = (),
    keeping: Keeping | None = None,
) -> PackedBatch:
    """Lay lists of ids end to end, in the order given. From `type_starts[i]` on, tokens of i are of type 1."""
    lengths = [len(ids) for ids in token_ids]
    bounds = tuple(accumulate(lengths, initial=0))
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    ends = lengths
    if keeping is not None:
        positions += np.repeat(keeping.pasts, lengths)
        ends = [past + length for past, length in zip(keeping.pasts, lengths, strict=True)]
    arrays: dict[str, NDArray[np.int64] | NDArray[np.int32]] = {
        "input_ids": np.fromiter(chain.from_iterable(token_ids), np.int64, bounds[-1]),
        "position_ids": positions,
        "cu_seqlens": np.array(bounds, np.int32),
    }
    if type_starts is not None and any(start is not None for start in type_starts):
        split = [end if start is None else start for start, end in zip(type_starts, ends, strict=True)]
        arrays["token_type_ids"] = (positions >= np.repeat(split, lengths)).astype(np.int64)
    if any(place is not None for place in unseen):
        counts = [length if place is None else place for place, length in zip(unseen, lengths, strict=True)]
        arrays["seen"] = np.array(counts, np.int32)
    if keeping is not None:
        assert all(
            place is None for place, own in zip(unseen, keeping.blocks, strict=False) if own is not None
        )
        arrays |= _kept_arrays(keeping, lengths, positions)
    there = dict(zip(arrays, upload(device, *arrays.values()), strict=True))
    packed = PackedBatch(
        input_ids=there["input_ids"],
        position_ids=there["position_ids"],
        cu_seqlens=there["cu_seqlens"],
        bounds=bounds,
        runs=_runs(lengths),
        token_type_ids=there.get("token_type_ids"),
        adapters=tuple(adapters) if adapters and any(adapters) else (),
        unseen=tuple(unseen) if "seen" in there else (),
        seen=there.get("seen"),
    )
    if keeping is None:
        return packed
    past = _past(packed, there, keeping.pasts.count(0)) if any(keeping.pasts) else None
    return replace(packed, kept=Kept(keeping.storage.layers, there["slots"], past))


def _kept_arrays(
    keeping: Keeping, lengths: Seq[int], positions: NDArray[np.int64]
) -> dict[str, NDArray[np.int64] | NDArray[np.int32]]:
    """Of a `Kept` and its `Past`, what a device reads; the pages as one row after the other."""
    size = keeping.storage.block_size
    pasts, own = np.array(keeping.pasts), np.array(lengths)
    needed = (pasts + own + size - 1) // size  # blocks up to the last token in the row
    kept = np.array([blocks is not None for blocks in keeping.blocks])
    first = np.count_nonzero(pasts == 0)
    if pasts[:first].any() or not kept[first:].all():
        raise ValueError("sequences with a past come last, and have their blocks")
    needed[~kept] = 0
    held = [(blocks or ())[:count] for blocks, count in zip(keeping.blocks, needed.tolist(), strict=True)]
    if any(len(blocks) != count for blocks, count in zip(held, needed.tolist(), strict=True)):
        raise ValueError("a sequence has fewer blocks than its tokens need")
    blocks = np.fromiter(chain.from_iterable(held), np.int64, needed.sum())
    if blocks.size and not 0 <= blocks.min() <= blocks.max() < keeping.storage.num_blocks:
        raise ValueError(f"a block lies beyond the {keeping.storage.num_blocks} of the storage")
    slots = np.full(len(positions), -1)
    placed = np.repeat(kept, own)
    place = positions[placed]
    of_token = np.repeat(np.cumsum(needed) - needed, own)[placed] + place // size
    slots[placed] = blocks[of_token] * size + place % size
    arrays: dict[str, NDArray[np.int64] | NDArray[np.int32]] = {"slots": slots}
    if pasts.any():
        wanted = needed[first:]
        pages = np.zeros((len(wanted), wanted.max()), np.int32)
        pages[np.arange(wanted.max()) < wanted[:, None]] = blocks[needed[:first].sum() :]
        arrays["pages"] = pages.ravel()
        arrays["past_cu_seqlens"] = np.concatenate(([0], np.cumsum(own[first:]))).astype(np.int32)
        arrays["key_lengths"] = (pasts + own)[first:].astype(np.int32)
    return arrays


def _past(packed: PackedBatch, there: Mapping[str, Tensor], first: int) -> Past:
    """Of the sequences from `first` on. Their arrays are `there`, on the device."""
    lengths = packed.lengths
    others = None
    if first:
        others = Layout(
            runs=_runs(lengths[:first]),
            longest=max(lengths[:first]),
            cu_seqlens=packed.cu_seqlens[: first + 1],
            positions=packed.position_ids[: packed.bounds[first]],
            unseen=packed.unseen[:first],
            seen=None if packed.seen is None else packed.seen[:first],
        )
    return Past(
        start=packed.bounds[first],
        longest=max(lengths[first:]),
        pages=there["pages"].view(len(lengths) - first, -1),
        cu_seqlens=there["past_cu_seqlens"],
        key_lengths=there["key_lengths"],
        others=others,
    )


def select(batch: PackedBatch, chosen: Seq[int]) -> tuple[PackedBatch, Tensor]:
    """These sequences of a batch as one of their own, in the order given; int64 [T]: where their tokens came from."""
    assert batch.kept is None, "the sequences of a row that is kept may need each other"
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
