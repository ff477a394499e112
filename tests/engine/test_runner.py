"""ModelRunner and Pooler over a stand-in backbone whose hidden states are its token ids."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from carpool.engine.batch import Batch
from carpool.engine.errors import InferenceFailed
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import PackedBatch
from carpool.engine.params import EmbedDType, PoolingParams, Task
from carpool.engine.poolers.embed import EmbedHead, EmbedPool, TokenEmbedPool
from carpool.engine.poolers.pooler import Pooler
from carpool.engine.runner import ModelRunner, Row
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode
from carpool.engine.staging import Arrival, Host
from carpool.kernels import crew
from carpool.kernels.launch import LaunchError

CPU = torch.device("cpu")
NAN, INFINITE, BREAKS, WEIGHTS = 90, 91, 92, torch.tensor([1.0, -2.0, 0.5, 3.0])


class StandIn:
    """Row t is `ids[t] * WEIGHTS`; some ids do what broken models do."""

    def __init__(self, room: int = 10**9, shortage: type[Exception] = torch.OutOfMemoryError) -> None:
        self.room = room
        self.shortage = shortage
        self.batches: list[int] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        self.batches.append(len(batch.cu_seqlens) - 1)
        assert torch.is_inference_mode_enabled()
        if BREAKS in batch.input_ids:
            raise IndexError("index out of range in self")
        if batch.num_tokens > self.room:
            raise self.shortage("out of memory")
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


@pytest.mark.parametrize("shortage", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_whole_that_lacks_memory_is_told_of_once_each_time(
    shortage: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever says so: a GPU's allocator, a native kernel, or torch of a CPU."""
    runner = make(StandIn(4, shortage))
    rows = runner.run(batch([1, 1], [2, 2, 2], [3, 3, 3, 3, 3]))
    assert [isinstance(row, InferenceFailed) for row in rows] == [False, False, True]
    assert str(rows[2]) == (
        "5 tokens do not fit in memory, even alone: start the server with a lower --max-model-len."
    )
    assert [record.getMessage() for record in caplog.records] == [
        "A batch of 10 tokens does not fit in memory and is run in halves. To keep such batches out, lower "
        "--max-num-batched-tokens.",
        "A batch of 8 tokens does not fit in memory and is run in halves. To keep such batches out, lower "
        "--max-num-batched-tokens.",
        "A batch of 5 tokens does not fit in memory. To keep such batches out, lower --max-model-len.",
    ]


def test_a_failed_try_holds_on_to_no_tensor_while_the_next_one_runs() -> None:
    """Else the halves would have less room than the whole: a traceback keeps the variables of its functions."""
    held: list[weakref.ref[Tensor]] = []

    class Greedy(StandIn):
        def forward(self, batch: PackedBatch) -> Tensor:
            assert all(tensor() is None for tensor in held)
            activations = super().forward(batch)
            held.append(weakref.ref(activations))
            if batch.num_tokens > 1:
                self.fail(activations + 1)
            return activations

        def fail(self, product: Tensor) -> None:
            held.append(weakref.ref(product))
            try:
                raise LaunchError("a kernel that cannot")
            except LaunchError:
                raise torch.OutOfMemoryError  # noqa: B904 as the twin would, in the kernel's place

    rows = make(Greedy()).run(batch([1], [2], [3]))
    assert not any(isinstance(row, InferenceFailed) for row in rows)
    assert len(held) == 5 + 2, "five tries, of which two failed"


@pytest.mark.parametrize("token", [1, BREAKS])
def test_idle_cores_help_while_a_batch_is_run_and_no_longer(
    token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaders, seen = 0, []

    @contextmanager
    def leading() -> Iterator[None]:
        nonlocal leaders
        leaders += 1
        try:
            yield
        finally:
            leaders -= 1

    class Watched(StandIn):
        def forward(self, batch: PackedBatch) -> Tensor:
            seen.append(leaders)
            return super().forward(batch)

    monkeypatch.setattr(crew, "leading", leading)
    make(Watched()).run(Batch.of([Sequence(0, 0, [token], PoolingParams())]))
    assert (seen, leaders) == ([1], 0)


def test_what_kills_the_thread_is_not_caught() -> None:
    class Killed(StandIn):
        def forward(self, batch: PackedBatch) -> Tensor:
            raise SystemExit

    with pytest.raises(SystemExit):
        make(Killed()).run(batch([1]))


# ── under way ────────────────────────────────────────────────────────────────────────────────────────────────


class Device(Host):
    """A device whose results come when they are waited for, if they come."""

    depth = 2

    def __init__(self) -> None:
        self.told: list[str] = []
        self.breaks: set[int] = set()  # which of the arrivals, counted from 0
        self.lost = False
        self.sent = 0

    def send_for(self, tensors: Seq[Tensor]) -> Arrival:
        number, self.sent = self.sent, self.sent + 1
        self.told.append(f"sent {number}")

        def arrive() -> list[np.ndarray[Any, Any]]:
            self.told.append(f"landed {number}")
            if number in self.breaks:
                raise RuntimeError("an error of the device, found out late")
            return Host.send_for(self, tensors)()

        return arrive

    def recover(self) -> None:
        self.told.append("recovered")
        if self.lost:
            raise RuntimeError("the device is lost")


@pytest.fixture
def device() -> Device:
    return Device()


def on(device: Device, backbone: StandIn | None = None) -> ModelRunner:
    runner = make(backbone)
    runner._carrier = device
    return runner


def first(rows: list[Row]) -> list[float | None]:
    return [float(row[0]) if isinstance(row, np.ndarray) else None for row in rows]


def test_batches_are_under_way_until_they_land(device: Device) -> None:
    runner = on(device)
    assert runner.depth == 2
    landings = [runner.launch(batch([number])) for number in (1, 2)]
    assert device.told == ["sent 0", "sent 1"]
    assert [first(landing()) for landing in landings] == [[1], [2]]
    assert device.told[2:] == ["landed 0", "landed 1"]


def test_a_batch_that_fails_at_landing_is_halved_and_its_neighbour_lands_all_the_same(device: Device) -> None:
    device.breaks = {0}
    runner = on(device)
    landings = [runner.launch(batch([1], [2], [3])), runner.launch(batch([4]))]
    assert [first(landing()) for landing in landings] == [[1, 2, 3], [4]]


def test_a_batch_that_fails_at_launch_waits_with_the_next_try_until_it_lands(device: Device) -> None:
    """The batches before it hold memory until then."""
    backbone = StandIn(room=3)
    runner = on(device, backbone)
    landings = [runner.launch(batch([1])), runner.launch(batch([2, 2], [3, 3]))]
    assert backbone.batches == [1, 2]
    assert first(landings[0]()) == [1]
    assert "recovered" not in device.told
    assert first(landings[1]()) == [2, 3]
    assert backbone.batches == [1, 2, 1, 1]


def test_a_lost_device_is_not_taken_for_a_bad_input(device: Device) -> None:
    """Every further batch would fail: whoever drives the runner has to know."""
    device.breaks, device.lost = {0}, True
    with pytest.raises(RuntimeError, match="the device is lost"):
        on(device).launch(batch([1], [2]))()


# ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_replica_for_another_device_has_everything_there_and_leaves_everything_here() -> None:
    class Holder(StandIn):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2).requires_grad_(False)
            self.tied = self.layer.weight
            self.unregistered = {"table": [torch.ones(3)]}
            self.layer.register_buffer("cache", torch.zeros(2), persistent=False)

    runner = make(Holder(), dense=nn.Linear(4, 4).requires_grad_(False))
    moved = runner.replica(torch.device("meta"))
    theirs, ours = cast(Holder, moved._backbone), cast(Holder, runner._backbone)
    assert theirs.tied is theirs.layer.weight
    assert isinstance(theirs.tied, nn.Parameter)
    for holder, place in ((ours, "cpu"), (theirs, "meta")):
        tensors = [*holder.layer.parameters(), *holder.layer.buffers(), holder.unregistered["table"][0]]
        assert {tensor.device.type for tensor in tensors} == {place}
    for work, place in ((runner, "cpu"), (moved, "meta")):
        pool = cast(EmbedPool, work._pooler._pools["embed"])
        assert {weight.device.type for weight in pool._head._dense.parameters()} == {place}


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


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("task", ["embed", "token_embed"])
@given(ids=st.lists(st.integers(1, 80), min_size=1, max_size=5), data=st.data())
@settings(deadline=None)
def test_16_bit_rows_are_the_float32_rows_cast(
    dtype: EmbedDType, kind: Any, task: Task, ids: list[int], data: st.DataObject
) -> None:
    """Rounded as numpy rounds, which is what was sent before the device did it; neighbours keep theirs."""
    asked = [data.draw(st.sampled_from(["float32", dtype])) for _ in ids]
    widths = [data.draw(st.integers(1, 4)) for _ in ids]

    def rows(dtypes: list[Any]) -> list[Any]:
        params = [PoolingParams(embed_dtype=d, dimensions=w) for d, w in zip(dtypes, widths, strict=True)]
        sequences = [
            Sequence(i, 0, [n, i, 5], p, task) for i, (n, p) in enumerate(zip(ids, params, strict=True))
        ]
        return make(normalize=True).run(Batch(tuple(sequences)))

    for own, row, exact in zip(asked, rows(asked), rows(["float32"] * len(ids)), strict=True):
        truth = exact if own == "float32" else exact.astype(kind)
        assert row.dtype == truth.dtype
        assert row.tobytes() == truth.tobytes()


def test_what_may_be_too_large_for_16_bits_comes_in_float32() -> None:
    params = PoolingParams(embed_dtype="float16", use_activation=False)
    (row,) = make(normalize=True).run(batch([80_000], params=params))
    assert vector(row).dtype == np.float32
    np.testing.assert_array_equal(vector(row), 80_000 * WEIGHTS.numpy())


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


# ── what is wanted of a row ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("modes", "wanted"),
    [(("cls",), [0, 2]), (("last",), [1, 4]), (("mean",), None), (("cls", "last"), None), (("max",), None)],
)
def test_a_backbone_is_told_of_the_tokens_that_are_read_if_those_are_first_or_last_ones(
    modes: tuple[PoolingMode, ...], wanted: list[int] | None
) -> None:
    assert told(modes, batch([1, 2], [3, 4, 5])) == wanted


def test_beside_adapters_the_whole_row_is_wanted() -> None:
    """They find their tokens by where those lie in it."""
    plain, adapted = (Sequence(i, 0, [1, 2], PoolingParams(), adapter=i) for i in (0, 1))
    assert told(("cls",), Batch((plain,))) == [0]
    assert told(("cls",), Batch((plain, adapted))) is None


def told(modes: tuple[PoolingMode, ...], work: Batch) -> list[int] | None:
    """What a backbone is told to be wanted of the work."""

    class Asked(StandIn):
        wanted: Tensor | None = None

        def forward(self, batch: PackedBatch) -> Tensor:
            self.wanted = batch.wanted
            return super().forward(batch)

    backbone = Asked()
    assert all(isinstance(row, np.ndarray) for row in make(backbone, modes).run(work))
    return None if backbone.wanted is None else backbone.wanted.tolist()
