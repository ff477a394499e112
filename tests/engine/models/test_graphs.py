"""Graphs: whatever is recorded for a bucket says of every batch in it what the model says without.

A tape stands in for the device: it repeats what was recorded on the same tensors, with everything that the host knew
then.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from carpool.engine.build import Parts, build
from carpool.engine.cache.storage import Storage
from carpool.engine.config import EngineConfig
from carpool.engine.models import attention, graphs
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.graphs import Bucket, CudaRecorder, GraphedBackbone, Recorder, Replay, graphed
from carpool.engine.models.moving import moving_to
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.models.stretching import StretchingBackbone
from carpool.engine.packing import Keeping, PackedBatch, pack_ids
from carpool.kernels import reference
from carpool.kernels.layout import Layout
from emu.backend import Emulated

CPU = torch.device("cpu")
BUCKETS = Bucket(16, 3), Bucket(40, 6)


@dataclass
class Tape:
    """Repeats on a CPU. `played` are the sizes that were."""

    played: list[int] = field(default_factory=list)

    def __call__(self, device: torch.device) -> Recorder:
        return self

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        out = work()

        def replay() -> None:
            self.played.append(len(out))
            out.copy_(work())

        return replay, out


def by_bounds(query: Tensor, key: Tensor, value: Tensor, row: Layout, **kind: Any) -> Tensor:
    """Attention as a device computes it: where sequences end, it reads from the row's own memory."""
    runs = [(length, 1) for length in row.cu_seqlens.diff().tolist() if length]
    return reference.varlen_attention(query, key, value, runs, **kind)


@pytest.fixture
def inner(parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Backbone]:
    monkeypatch.setattr(attention, "varlen_attention", by_bounds)
    return lambda family: parts(family).runners[0]._backbone.replica()


@pytest.fixture
def tape() -> Tape:
    return Tape()


def batch(*lengths: int, seed: int = 1, **more: Any) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    return pack_ids([torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths], CPU, **more)


@torch.inference_mode()
def same(one: Backbone, other: Backbone, packed: PackedBatch) -> bool:
    ours, theirs = one.forward(packed), other.forward(packed)
    return ours.shape == theirs.shape and bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


# ── the same as without ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_batch_comes_out_as_without_graphs(
    family: str, inner: Callable[[str], Backbone], tape: Tape
) -> None:
    own = inner(family)
    backbone, notice = graphed(own, vocab_size=60, max_model_len=100, recorder=tape, buckets=BUCKETS)
    assert notice is None
    assert isinstance(backbone, GraphedBackbone)
    tape.played.clear()
    sizes = []
    for tokens in (*range(1, 20), 39, 40, 41):
        for sequences in (1, 3, 6, 7):
            if sequences <= tokens:
                each = [tokens // sequences] * (sequences - 1)
                assert same(backbone, own, batch(*each, tokens - sum(each), seed=tokens))
                fits = [
                    size.tokens for size in BUCKETS if tokens <= size.tokens and sequences <= size.sequences
                ]
                sizes += fits[:1]
    assert tape.played == sizes, "each by the smallest that holds it, and those beyond the last by none"
    assert {16, 40} == set(sizes)


@pytest.mark.parametrize("family", ["roberta", "qwen3"])
def test_the_cuda_kernels_follow_what_is_laid_out(
    family: str, checkpoint: Callable[[str], Path], emulated: Emulated, tape: Tape
) -> None:
    """Empty sequences and all."""
    config = EngineConfig(model=str(checkpoint(family)), dtype="float32", cpu_workers=1)
    own = build(config).runners[0]._backbone
    backbone, notice = graphed(own, vocab_size=60, max_model_len=100, recorder=tape, buckets=(Bucket(20, 4),))
    assert notice is None
    assert backbone is not own
    for packed in (batch(1), batch(3, 9), batch(5, 5, 5, 5)):
        assert same(backbone, own, packed)
    assert "attention" in emulated.ran


def test_what_fills_a_batch_up_has_a_place_in_every_table(
    inner: Callable[[str], Backbone], tape: Tape
) -> None:
    """Of 128 places; RoBERTa counts places by itself, over pad tokens and all."""
    for family in ("bert", "xlmr", "roberta"):
        own = inner(family)
        backbone = GraphedBackbone(own, tape, (Bucket(400, 4),))
        assert same(backbone, own, batch(3, 90, 5))
        ids = [[0, 1, 5, 1, 2], [1, 0, 5, 2], [1]]
        assert same(backbone, own, pack_ids(ids, CPU))
    assert tape.played == 6 * [400]


def test_what_is_played_has_every_row_whatever_is_wanted(
    checkpoint: Callable[[str], Path], tape: Tape
) -> None:
    config = EngineConfig(model=str(checkpoint("qwen3")), dtype="float32", cpu_workers=1)
    own = build(config).runners[0]._backbone
    backbone = GraphedBackbone(own, tape, BUCKETS)
    packed = batch(3, 6)
    with torch.inference_mode():
        whole = backbone.forward(packed)
        assert torch.isfinite(whole).all()
        some = replace(packed, wanted=torch.tensor([2, 8]))
        assert torch.isnan(own.forward(some)).any()
        assert torch.equal(backbone.forward(some), whole)


def test_a_batch_leaves_nothing_to_the_next(inner: Callable[[str], Backbone], tape: Tape) -> None:
    own = inner("bert")
    backbone = GraphedBackbone(own, tape, BUCKETS)
    typed = batch(9, 20, type_starts=[4, None])
    for each in (typed, batch(9, 20), batch(1), batch(40), typed, batch(4, 4, 4, 4)):
        assert same(backbone, own, each)
    assert not torch.equal(own.forward(typed), own.forward(batch(9, 20))), "this test sees no types"


def test_a_result_is_not_overwritten_by_the_next(inner: Callable[[str], Backbone], tape: Tape) -> None:
    """Two batches may be under way, and results are read from another stream."""
    backbone = GraphedBackbone(inner("qwen3"), tape, BUCKETS)
    with torch.inference_mode():
        first = backbone.forward(batch(5, 9))
        kept = first.clone()
        backbone.forward(batch(9, 5, seed=2))
    assert torch.equal(first, kept)


def test_what_is_played_reads_the_memory_that_was_recorded(
    inner: Callable[[str], Backbone], tape: Tape
) -> None:
    own = inner("bert")
    seen: set[tuple[int, ...]] = set()

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs["input_ids"], kwargs["position_ids"], kwargs["token_type_ids"]
        seen.add(tuple(tensor.data_ptr() for tensor in given))

    own.module.register_forward_pre_hook(note, with_kwargs=True)
    backbone = GraphedBackbone(own, tape, BUCKETS)
    for packed in (batch(3), batch(30), batch(2, 2, 2)):
        backbone.forward(packed)
    assert len(tape.played) == 3
    assert len(seen) == 1, "buckets of all sizes lie in the same buffers"


def test_it_is_called_in_either_mode(inner: Callable[[str], Backbone], tape: Tape) -> None:
    own = inner("bert")
    backbone = GraphedBackbone(own, tape, BUCKETS)
    with torch.no_grad():
        plain = backbone.forward(batch(5))
    with torch.inference_mode():
        assert torch.equal(backbone.forward(batch(5)), plain)


def test_a_replica_has_buffers_of_its_own(inner: Callable[[str], Backbone], tape: Tape) -> None:
    one = GraphedBackbone(inner("bert"), tape, BUCKETS)
    two = one.replica()
    assert one._ids.data_ptr() != two._ids.data_ptr()
    assert all(a is b for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert same(one, two, batch(4, 5))


def test_a_copy_for_another_device_records_its_own(
    inner: Callable[[str], Backbone], checkpoint: Callable[[str], Path], tape: Tape
) -> None:
    """What was recorded cannot be copied; here the other device is the same one."""
    plain = build(EngineConfig(model=str(checkpoint("bert")), dtype="float32", cpu_workers=1, surgery=False))
    one = GraphedBackbone(plain.runners[0]._backbone, tape, BUCKETS)
    lock = threading.Lock()  # which no copy is made of
    one._graphs[BUCKETS[0]] = (lock.release, one._graphs[BUCKETS[0]][1])
    with moving_to(torch.device("cpu")):
        two = copy.deepcopy(one)
    theirs = {weight.data_ptr() for weight in two.module.parameters()}
    assert not theirs & {weight.data_ptr() for weight in one.module.parameters()}
    assert same(two, one._inner, batch(4, 5))


# ── what runs without ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "packed",
    [
        batch(41),
        batch(*[1] * 7),
        batch(3, 3, adapters=[0, 1]),
        batch(5, 5, unseen=[None, 3]),
        batch(5, 5, keeping=Keeping(Storage((), 2, 4), [None, [0, 1]], [0, 2])),
    ],
    ids=["too many tokens", "too many sequences", "adapters", "unseen", "kept"],
)
def test_what_fits_no_graph_is_run_by_the_model_itself(
    packed: PackedBatch, inner: Callable[[str], Backbone], tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = inner("bert")
    backbone = GraphedBackbone(own, tape, BUCKETS)
    given: list[PackedBatch] = []

    def forward(batch: PackedBatch) -> Tensor:
        given.append(batch)
        return torch.zeros(batch.num_tokens, 32)

    monkeypatch.setattr(own, "forward", forward)
    assert backbone.forward(packed).shape == (packed.num_tokens, 32)
    assert given == [packed]
    assert tape.played == []


def test_attention_that_follows_the_host_is_found_out(parts: Callable[[str], Parts], tape: Tape) -> None:
    """On a CPU attention goes over the lengths that the host knows."""
    own = parts("bert").runners[0]._backbone
    backbone, notice = graphed(own, vocab_size=60, max_model_len=128, recorder=tape, buckets=BUCKETS)
    assert backbone is own
    assert notice is not None
    assert notice.startswith(
        "BertModel runs without CUDA graphs, which were asked for: played back, its results"
    )


@pytest.mark.parametrize(
    "place", [0, 1, -1], ids=["too early", "as the last batch left it", "without filling up"]
)
def test_lengths_laid_out_wrongly_are_found_out(
    place: int, inner: Callable[[str], Backbone], tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: bounds are not where they belong."""
    honest = GraphedBackbone._lay

    def lay(self: GraphedBackbone, packed: PackedBatch, bucket: Bucket) -> None:
        bounds = self._cu_seqlens[: bucket.sequences + 2]
        before = bounds.clone()
        honest(self, packed, bucket)
        if place == 0:
            bounds[:-1] = bounds[1:].clone()
        elif place == 1:
            bounds.copy_(before)
        else:
            bounds[bounds == packed.num_tokens] = bucket.tokens

    monkeypatch.setattr(GraphedBackbone, "_lay", lay)
    own = inner("bert")
    backbone, notice = graphed(own, vocab_size=60, max_model_len=128, recorder=tape, buckets=BUCKETS)
    assert backbone is own
    assert "BertModel runs without CUDA graphs, which were asked for: played back, its results differ" in str(
        notice
    )


def test_a_recording_that_fails_is_said_and_the_model_runs_as_it_was(
    inner: Callable[[str], Backbone],
) -> None:
    class Broken(Tape):
        def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
            raise RuntimeError("called a synchronizing CUDA operation\nand more of it")

    own = inner("bert")
    backbone, notice = graphed(own, vocab_size=60, max_model_len=128, recorder=Broken())
    assert backbone is own
    assert notice == (
        "BertModel runs without CUDA graphs, which were asked for: called a synchronizing CUDA operation."
    )


def test_what_cannot_be_recorded_is_not_tried(inner: Callable[[str], Backbone], tape: Tape) -> None:
    def never(work: object) -> Any:
        raise AssertionError("tried")

    tape.record = never  # type: ignore[method-assign]
    own = inner("bert")
    for unfit, why in (
        (PaddedBackbone(own.replica().module, attention="sdpa", pads=True), "padded"),
        (StretchingBackbone(own, 64), "rotary frequencies"),
    ):
        backbone, notice = graphed(unfit, vocab_size=60, max_model_len=128, recorder=tape)
        assert backbone is unfit
        assert why in str(notice)


# ── recording on a device, against a stand-in for torch.cuda ─────────────────────────────────────────────────


class Cuda:
    """What torch.cuda is asked for, in order; `capture` may fail as a real one does, without putting streams back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.current, self.broken = "main", False
        self.mode: int | str = 0
        for name in (
            "Stream", "CUDAGraph", "graph", "graph_pool_handle", "device", "stream", "current_stream", "set_stream",
            "get_sync_debug_mode", "set_sync_debug_mode",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device: object = None) -> Any:
        return FakeStream(self, "side")

    def CUDAGraph(self) -> Any:
        return type("Graph", (), {"replay": lambda _: self.told.append("replay")})()

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        self.told.append(f"on {device}")
        yield

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: object, *, pool: str, stream: FakeStream) -> Iterator[None]:
        self.told.append(f"record in {pool}")
        self.current = stream.name
        yield
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = "main"
        self.told.append("recorded")

    def current_stream(self) -> Any:
        return FakeStream(self, self.current)

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream.name

    def get_sync_debug_mode(self) -> int | str:
        return self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = mode


@dataclass
class FakeStream:
    cuda: Cuda
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_work_is_warmed_up_and_asked_whether_it_waits_before_it_is_recorded(cuda: Cuda) -> None:
    out = torch.zeros(1)

    def work() -> Tensor:
        cuda.told.append(f"work on {cuda.current}, mode {cuda.mode}")
        return out

    replay, result = CudaRecorder(torch.device("cuda:1")).record(work)
    assert result is out
    assert cuda.told == [
        "on cuda:1",
        "side waits for main",
        "work on side, mode 0",
        "work on side, mode error",
        "record in pool",
        "work on side, mode 0",
        "recorded",
        "main waits for side",
    ]
    replay()
    assert cuda.told[-1] == "replay"


def test_a_recording_that_fails_puts_everything_back(cuda: Cuda) -> None:
    cuda.broken = True
    with pytest.raises(RuntimeError, match="capturing"):
        CudaRecorder(torch.device("cuda")).record(lambda: torch.zeros(1))
    assert (cuda.current, cuda.mode) == ("main", 0)


def test_work_that_waits_is_not_recorded(cuda: Cuda) -> None:
    def work() -> Tensor:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaRecorder(torch.device("cuda")).record(work)
    assert "record in pool" not in cuda.told
    assert (cuda.current, cuda.mode) == ("main", 0)


def test_the_buckets_rise() -> None:
    """The smallest that holds a batch is the first that does."""
    sizes = graphs.BUCKETS
    assert list(sizes) == sorted(sizes)
    assert [size.sequences for size in sizes] == sorted(size.sequences for size in sizes)
