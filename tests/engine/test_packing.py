"""Packing: every token once, in order, with its place in its own sequence."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.batch import Batch
from carpool.engine.cache.blocks import BlockPool, Prompt
from carpool.engine.cache.storage import Storage
from carpool.engine.packing import Keeping, pack, pack_ids, places_of, select
from carpool.engine.params import PoolingParams
from carpool.engine.sequence import Sequence

CPU = torch.device("cpu")
rows = st.lists(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), min_size=1, max_size=12)


@given(rows)
def test_a_row_holds_every_sequence_end_to_end(token_ids: list[list[int]]) -> None:
    packed = pack_ids(token_ids, CPU)
    bounds = packed.cu_seqlens.tolist()
    assert packed.input_ids.tolist() == list(chain.from_iterable(token_ids))
    assert packed.position_ids.tolist() == list(chain.from_iterable(range(len(ids)) for ids in token_ids))
    assert (bounds[0], len(bounds), packed.num_tokens) == (0, len(token_ids) + 1, bounds[-1])
    assert packed.bounds == tuple(bounds)
    for ids, start, end in zip(token_ids, bounds, bounds[1:], strict=False):
        assert packed.input_ids[start:end].tolist() == ids
    assert (packed.input_ids.dtype, packed.cu_seqlens.dtype) == (torch.int64, torch.int32)


@given(rows)
def test_runs_are_the_neighbours_of_equal_length(token_ids: list[list[int]]) -> None:
    packed = pack_ids(token_ids, CPU)
    spread = list(chain.from_iterable([length] * count for length, count in packed.runs))
    assert spread == [len(ids) for ids in token_ids]
    assert all(a[0] != b[0] for a, b in zip(packed.runs, packed.runs[1:], strict=False))
    assert packed.max_seqlen == max(map(len, token_ids))


@given(rows)
def test_a_batch_is_sorted_and_loses_nothing(token_ids: list[list[int]]) -> None:
    sequences = [Sequence(0, i, ids, PoolingParams()) for i, ids in enumerate(token_ids)]
    batch = Batch.of(sequences)
    assert set(batch.sequences) == set(sequences)
    assert batch.num_tokens == sum(map(len, token_ids))
    assert len(pack(batch, CPU).runs) == len({len(ids) for ids in token_ids})
    if len(sequences) > 1:
        left, right = batch.halves()
        assert left.sequences + right.sequences == batch.sequences
        assert left.sequences
        assert right.sequences


def test_adapters_come_along_where_there_are_any() -> None:
    def packed(*adapters: int) -> tuple[int, ...]:
        sequences = [Sequence(0, i, [7, 8], PoolingParams(), adapter=slot) for i, slot in enumerate(adapters)]
        return pack(Batch.of(sequences), CPU).adapters

    assert packed(2, 0, 1) == (0, 1, 2)
    assert packed(0, 0) == ()


def test_what_is_not_looked_at_is_told_to_host_and_device() -> None:
    packed = pack_ids([[1, 2, 3], [4, 5], [6]], CPU, unseen=[2, None, 0])
    assert (packed.unseen, packed.seen is not None) == ((2, None, 0), True)
    assert packed.seen is not None
    assert packed.seen.tolist() == [2, 2, 0]
    selected, _ = select(packed, [2, 0])
    assert selected.seen is not None
    assert (selected.unseen, selected.seen.tolist()) == ((0, 2), [0, 2])
    assert pack_ids([[1]], CPU, unseen=[None]).seen is None


@given(rows, st.data())
def test_places_are_those_of_each_chosen_sequence_in_turn(
    token_ids: list[list[int]], data: st.DataObject
) -> None:
    bounds = pack_ids(token_ids, CPU).bounds
    chosen = data.draw(st.lists(st.sampled_from(range(len(token_ids))), max_size=6))
    every = [place for i in chosen for place in range(bounds[i], bounds[i + 1])]
    assert places_of(bounds, chosen).tolist() == every


def test_lengths_are_those_of_the_runs() -> None:
    assert pack_ids([[1], [2, 3], [4, 5], [6]], CPU).lengths == [1, 2, 2, 1]


@given(rows, st.data())
def test_a_selection_is_what_packing_those_alone_would_be(
    token_ids: list[list[int]], data: st.DataObject
) -> None:
    numbers = range(len(token_ids))
    chosen = data.draw(st.lists(st.sampled_from(numbers), min_size=1, unique=True))
    starts = [data.draw(st.none() | st.integers(0, len(ids))) for ids in token_ids]
    slots = [data.draw(st.integers(0, 2)) for _ in numbers]
    packed = pack_ids(token_ids, CPU, starts, slots)
    selected, places = select(packed, chosen)
    alone = pack_ids(
        [token_ids[i] for i in chosen], CPU, [starts[i] for i in chosen], [slots[i] for i in chosen]
    )
    for name in ("input_ids", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(selected, name), getattr(alone, name))
        assert getattr(selected, name).dtype == getattr(alone, name).dtype
    assert selected.runs == alone.runs
    assert selected.bounds == alone.bounds
    assert not any(selected.adapters) if not alone.adapters else selected.adapters == alone.adapters
    none = torch.zeros_like(alone.input_ids)
    types = [none if x.token_type_ids is None else x.token_type_ids for x in (selected, alone)]
    assert torch.equal(*types)
    assert torch.equal(packed.input_ids[places], selected.input_ids)


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────


@given(st.data(), st.integers(1, 5))
def test_every_token_that_is_kept_goes_to_its_slot_and_its_sequence_finds_it_there(
    data: st.DataObject, size: int
) -> None:
    """As the pool has it: prompts that have begun, and others that have not or of which nothing is kept."""
    pool = BlockPool(200, size)
    sequences = []
    for _ in range(data.draw(st.integers(1, 6))):
        ids = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=20))
        seq = Sequence(0, 0, ids, PoolingParams(), type_start=data.draw(st.none() | st.integers(0, len(ids))))
        if data.draw(st.booleans()):
            seq.prompt = Prompt(len(ids))
            seq.computed = data.draw(st.integers(0, len(ids) - 1))
            seq.table = pool.allocate(seq.prompt, data.draw(st.integers(seq.computed + 1, len(ids))))
        sequences.append(seq)
    counts = {
        seq: seq.num_tokens if seq.table is None else seq.table.upto - seq.computed for seq in sequences
    }
    batch = Batch.of(sequences, counts)
    packed = pack(batch, CPU, Storage((), 200, size))
    if not batch.is_paged:
        assert packed.kept is None
        return
    assert packed.kept is not None
    assert packed.lengths == list(batch.counts)
    assert packed.max_seqlen == max(batch.counts)
    slots = packed.kept.slots.tolist()
    types = [0] * packed.num_tokens if packed.token_type_ids is None else packed.token_type_ids.tolist()
    for seq, start, end in zip(batch.sequences, packed.bounds, packed.bounds[1:], strict=False):
        past, stop = seq.computed, seq.computed + end - start
        assert packed.input_ids[start:end].tolist() == seq.token_ids[past:stop]
        assert packed.position_ids[start:end].tolist() == list(range(past, stop))
        expected = [-1] * (end - start) if seq.table is None else pool.slots(seq.table, past, stop)
        assert slots[start:end] == expected
        second = stop if seq.type_start is None else seq.type_start
        assert types[start:end] == [int(place >= second) for place in range(past, stop)]
    looking_back = [seq for seq in batch.sequences if seq.computed]
    back = packed.kept.past
    if not looking_back:
        assert back is None
        return
    assert back is not None
    first = len(sequences) - len(looking_back)
    assert back.start == packed.bounds[first]
    assert back.cu_seqlens.tolist() == [bound - back.start for bound in packed.bounds[first:]]
    assert back.longest == max(packed.lengths[first:])
    ends = [seq.computed + counts[seq] for seq in looking_back]
    assert back.key_lengths.tolist() == ends
    for seq, pages, end in zip(looking_back, back.pages.tolist(), ends, strict=True):
        assert seq.table is not None
        assert [pages[i // size] * size + i % size for i in range(end)] == pool.slots(seq.table, 0, end)
    assert (back.pages.dtype, back.cu_seqlens.dtype, back.key_lengths.dtype) == (torch.int32,) * 3
    if not first:
        assert back.others is None
        return
    assert back.others is not None
    before = pack_ids([list(range(counts[seq])) for seq in batch.sequences[:first]], CPU)
    assert (back.others.runs, back.others.longest) == (before.runs, before.max_seqlen)
    assert torch.equal(back.others.cu_seqlens, before.cu_seqlens)
    assert torch.equal(back.others.positions, before.position_ids)


def test_those_beside_what_is_kept_may_have_tokens_that_are_not_looked_at() -> None:
    storage = Storage((), 4, 2)
    packed = pack_ids(
        [[1, 2, 3], [4]], CPU, unseen=[2, None], keeping=Keeping(storage, [None, [3, 0]], [0, 2])
    )
    assert packed.kept is not None
    assert packed.kept.past is not None
    others = packed.kept.past.others
    assert others is not None
    assert others.unseen == (2,)
    assert others.seen is not None
    assert others.seen.tolist() == [2]


@pytest.mark.parametrize(
    ("blocks", "pasts", "fault"),
    [
        ([[0, 1], None], [2, 0], "come last"),
        ([None, None], [0, 2], "have their blocks"),
        ([None, [1]], [0, 1], "fewer blocks"),
        ([None, [1, 4]], [0, 1], "beyond the 4"),
        ([None, [-1, 1]], [0, 1], "beyond the 4"),
    ],
)
def test_what_could_be_read_from_the_wrong_place_is_refused(
    blocks: list[list[int] | None], pasts: list[int], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        pack_ids([[1, 2], [3, 4]], CPU, keeping=Keeping(Storage((), 4, 2), blocks, pasts))


def test_of_a_kept_row_nothing_is_selected() -> None:
    packed = pack_ids([[1], [2]], CPU, keeping=Keeping(Storage((), 4, 2), [[0], None], [0, 0]))
    with pytest.raises(AssertionError, match="may need each other"):
        select(packed, [0])


def test_what_has_tokens_that_are_not_looked_at_is_not_kept() -> None:
    with pytest.raises(AssertionError):
        pack_ids([[1, 2]], CPU, unseen=[1], keeping=Keeping(Storage((), 4, 2), [[0]], [0]))
