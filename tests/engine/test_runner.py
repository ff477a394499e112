"""ModelRunner and Pooler over a stand-in backbone whose hidden states are its token ids."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from carpool.engine.batch import Batch
from carpool.engine.errors import InferenceFailed
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import PackedBatch
from carpool.engine.params import PoolingParams, Task
from carpool.engine.poolers.embed import EmbedHead, EmbedPool, TokenEmbedPool
from carpool.engine.poolers.pooler import Pooler
from carpool.engine.runner import ModelRunner
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode

CPU = torch.device("cpu")
NAN, INFINITE, BREAKS, WEIGHTS = 90, 91, 92, torch.tensor([1.0, -2.0, 0.5, 3.0])


class StandIn:
    """Row t is `ids[t] * WEIGHTS`; some ids do what broken models do."""

    def __init__(self, room: int = 10**9) -> None:
        self.room = room
        self.batches: list[int] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        self.batches.append(len(batch.cu_seqlens) - 1)
        assert torch.is_inference_mode_enabled()
        if BREAKS in batch.input_ids:
            raise IndexError("index out of range in self")
        if batch.num_tokens > self.room:
            raise torch.OutOfMemoryError("out of memory")
        hidden = batch.input_ids[:, None] * WEIGHTS
        hidden[batch.input_ids == NAN] = float("nan")
        hidden[batch.input_ids == INFINITE] = float("inf")
        return hidden


def make(
    backbone: StandIn | None = None, modes: tuple[PoolingMode, ...] = ("mean",), *, normalize: bool = False,
    dimensions: int | None = None, dense: nn.Module | None = None,
) -> ModelRunner:  # fmt: skip
    head = EmbedHead([dense] if dense else [], normalize, dimensions)
    pooler = Pooler({"embed": EmbedPool(modes, head), "token_embed": TokenEmbedPool(head)})
    return ModelRunner(cast(Backbone, backbone or StandIn()), pooler, CPU)


def batch(*token_ids: list[int], params: PoolingParams | None = None, task: Task = "embed") -> Batch:
    return Batch(
        tuple(Sequence(i, 0, ids, params or PoolingParams(), task) for i, ids in enumerate(token_ids))
    )


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [NAN, INFINITE])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_number_that_is_not_finite_fails_its_sequence_alone(bad: int, normalize: bool) -> None:
    backbone = StandIn()
    rows = make(backbone, normalize=normalize).run(batch([1, 2], [3, bad], [4]))
    assert isinstance(rows[1], InferenceFailed)
    assert "not finite" in str(rows[1])
    assert all(isinstance(rows[i], np.ndarray) for i in (0, 2))
    assert backbone.batches == [3], "nobody has to run again for it"


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_a_batch_that_raises_is_halved_until_only_the_guilty_fail(guilty: list[bool]) -> None:
    backbone = StandIn()
    rows = make(backbone).run(batch(*([BREAKS] if bad else [i] for i, bad in enumerate(guilty))))
    assert len(rows) == len(guilty)
    for i, (row, bad) in enumerate(zip(rows, guilty, strict=True)):
        if bad:
            assert isinstance(row, InferenceFailed)
            assert "IndexError" in str(row)
            assert isinstance(row.__cause__, IndexError)
        else:
            assert isinstance(row, np.ndarray)
            np.testing.assert_allclose(row, i * WEIGHTS.numpy())
    if not any(guilty):
        assert backbone.batches == [len(guilty)]


def test_memory_that_only_the_whole_batch_lacks_fails_nobody() -> None:
    rows = make(StandIn(room=4)).run(batch([1, 1], [2], [3, 3, 3], [4]))
    assert [float(cast(np.ndarray[tuple[int], np.dtype[np.float32]], row)[0]) for row in rows] == [1, 2, 3, 4]


def test_what_kills_the_thread_is_not_caught() -> None:
    class Killed(StandIn):
        def forward(self, batch: PackedBatch) -> Tensor:
            raise SystemExit

    with pytest.raises(SystemExit):
        make(Killed()).run(batch([1]))


# ── finishing ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_result_is_float32_whatever_the_models_dtype() -> None:
    class Half(StandIn):
        def forward(self, batch: PackedBatch) -> Tensor:
            return super().forward(batch).bfloat16()

    (row,) = make(Half()).run(batch([1, 2]))
    assert isinstance(row, np.ndarray)
    assert row.dtype == np.float32


def vector(row: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    assert isinstance(row, np.ndarray)
    return row


@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("models", [True, False])
def test_the_requests_wish_on_normalising_wins_over_the_models(own: bool | None, models: bool) -> None:
    (row,) = make(normalize=models).run(batch([2, 4], params=PoolingParams(use_activation=own)))
    expected = 3 * WEIGHTS.numpy()
    if models if own is None else own:
        expected = expected / np.linalg.norm(expected)
    np.testing.assert_allclose(vector(row), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("own", "configured", "width"), [(None, None, 4), (2, None, 2), (None, 3, 3), (4, 3, 4)]
)
def test_cut_first_then_normalised(own: int | None, configured: int | None, width: int) -> None:
    runner = make(normalize=True, dimensions=configured)
    (row,) = runner.run(batch([2], params=PoolingParams(dimensions=own)))
    cut = WEIGHTS.numpy()[:width]
    np.testing.assert_allclose(vector(row), cut / np.linalg.norm(cut), rtol=1e-6)


def test_widths_and_tasks_ride_in_one_batch() -> None:
    sequences = (
        Sequence(0, 0, [1, 3], PoolingParams(dimensions=2, use_activation=True)),
        Sequence(1, 0, [5, 7], PoolingParams(), "token_embed"),
        Sequence(2, 0, [9], PoolingParams(use_activation=False)),
        Sequence(3, 0, [2, 2, 2], PoolingParams(dimensions=1, use_activation=True), "token_embed"),
    )
    backbone = StandIn()
    embed, tokens, raw, cut = map(vector, make(backbone, normalize=False).run(Batch(sequences)))
    assert backbone.batches == [4]
    np.testing.assert_allclose(embed, np.array([1, -2]) / 5**0.5, rtol=1e-6)
    np.testing.assert_allclose(tokens, [5 * WEIGHTS.numpy(), 7 * WEIGHTS.numpy()])
    np.testing.assert_allclose(raw, 9 * WEIGHTS.numpy())
    np.testing.assert_allclose(cut, [[1], [1], [1]])


def test_several_modes_are_joined_before_the_dense_layer() -> None:
    dense = nn.Linear(8, 1, bias=False)
    dense.weight.data.copy_(torch.arange(8.0)[None])
    (row,) = make(modes=("cls", "last"), dense=dense).run(batch([1, 5, 2]))
    joined = np.concatenate([1 * WEIGHTS.numpy(), 2 * WEIGHTS.numpy()])
    np.testing.assert_allclose(vector(row), [joined @ np.arange(8)], rtol=1e-6)


def test_a_zero_vector_stays_zero_when_normalised() -> None:
    (row,) = make(normalize=True).run(batch([0]))
    np.testing.assert_array_equal(vector(row), np.zeros(4))


def test_later_batches_do_not_change_earlier_rows() -> None:
    """Rows are views of one array, and no array is used twice."""
    runner = make()
    first = [vector(row).copy() for row in runner.run(batch([1], [2]))]
    kept = [vector(row) for row in runner.run(batch([1], [2]))]
    runner.run(batch([7], [8]))
    for a, b in zip(first, kept, strict=True):
        np.testing.assert_array_equal(a, b)
