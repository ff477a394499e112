"""Packing: every token once, in order, with its place in its own sequence."""

from __future__ import annotations

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.batch import Batch
from carpool.engine.packing import pack, pack_ids, places_of, select
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
