"""Batch: what computes alike is neighbours."""

from __future__ import annotations

from typing import Any

from carpool.engine.batch import Batch
from carpool.engine.params import PoolingParams, Task
from carpool.engine.sequence import Sequence


def batch(*rows: tuple[int, int]) -> Batch:
    """Of sequences of (adapter, length), in the order given."""
    return Batch.of(
        [Sequence(0, i, [7] * n, PoolingParams(), adapter=adapter) for i, (adapter, n) in enumerate(rows)]
    )


def test_equal_lengths_are_neighbours_and_stay_in_order() -> None:
    assert [seq.index for seq in batch((0, 5), (0, 2), (0, 5), (0, 2)).sequences] == [1, 3, 0, 2]


def test_each_adapter_rides_in_one_piece() -> None:
    riders = [
        (seq.adapter, seq.num_tokens) for seq in batch((1, 5), (0, 2), (2, 1), (1, 2), (0, 9)).sequences
    ]
    assert riders == [(0, 2), (0, 9), (1, 2), (1, 5), (2, 1)]


def test_of_equal_work_one_sequence_is_run() -> None:
    """Ids, token types, adapter and what is not looked at make it; task and parameters do not."""
    kinds: list[dict[str, Any]] = [{}, {"type_start": 1}, {"adapter": 1}, {"unseen": 1}]
    asked: list[tuple[Task, list[int]]] = [("embed", [5, 6]), ("embed", [6, 5]), ("token_embed", [5, 6])]
    sequences = [
        Sequence(i, 0, list(ids), PoolingParams(dimensions=i), task, **kind)
        for i, kind in enumerate(kinds)
        for task, ids in asked
    ]
    whole = Batch.of(sequences)
    distinct, places = whole.distinct()
    assert len(distinct.sequences) == 2 * len(kinds)
    assert [distinct.sequences[place].work for place in places] == [seq.work for seq in whole.sequences]


def test_a_batch_without_equal_work_is_run_as_it_is() -> None:
    whole = batch((0, 1), (0, 2))
    assert whole.distinct() == (whole, [0, 1])
    assert whole.distinct()[0] is whole


def test_halves_hold_all() -> None:
    whole = batch((1, 5), (0, 2), (0, 3))
    first, second = whole.halves()
    assert first.sequences + second.sequences == whole.sequences
    assert (len(first.sequences), whole.num_tokens) == (1, 10)
