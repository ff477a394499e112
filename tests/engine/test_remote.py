"""A front's half of an engine over a socketpair: it answers as an engine of one process does, whatever happens."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pytest

import tiny
from carpool.engine import changes, parcel
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.batch import Batch
from carpool.engine.chat import ChatTemplate
from carpool.engine.config import EngineConfig
from carpool.engine.core import Core
from carpool.engine.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    InferenceFailed,
    NotReady,
    Overloaded,
    UnknownAdapter,
    UnsupportedTask,
)
from carpool.engine.frames import Adapters
from carpool.engine.gate import Gate
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import Matryoshka, PoolingParams, Task, TokenizationParams
from carpool.engine.preparation import Rack
from carpool.engine.remote import RemoteCore
from carpool.engine.terms import Terms
from carpool.engine.tokenizer import Tokenizer
from carpool.engine.worker import Landing, Row

POISON, DEADLY = 91, 92  # token ids: the first fails its sequence, the second kills the worker
TASKS = frozenset[Task]({"embed", "token_embed"})
MODEL = ModelInfo(
    root="here/stand-in", architectures=("StandIn",), tasks=TASKS, max_model_len=64, vocab_size=113, embedding_size=2,
    matryoshka=Matryoshka(2), pooling="mean", normalize=False, dtype="float32", device="cpu", workers=1, parameters=0,
    max_num_batched_tokens=64, max_num_seqs=8, attention="none",
)  # fmt: skip


class StandIn:
    """A runner that answers each sequence with its length and the sum of its ids, when the gate is open."""

    depth = 1

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.ran = 0  # sequences

    def bind(self) -> None:
        """Nothing to bind to."""

    def launch(self, batch: Batch) -> Landing:
        self.running.set()
        assert self.gate.wait(30), "a test forgot to open the gate"
        self.running.clear()
        ids = [seq.token_ids for seq in batch.sequences]
        if any(DEADLY in one for one in ids):
            raise SystemExit("the thread is gone")
        self.ran += len(ids)
        rows = [self._row(seq.token_ids, seq.task) for seq in batch.sequences]
        return lambda: rows

    def _row(self, ids: list[int], task: Task) -> Row:
        if POISON in ids:
            return InferenceFailed("poisoned")
        vector = np.array([len(ids), sum(ids)], np.float32)
        return vector if task == "embed" else np.outer(ids, vector).astype(np.float32)


@dataclass
class Built:
    runners: list[StandIn] = field(default_factory=lambda: [StandIn()])
    model: ModelInfo = MODEL
    chat: ChatTemplate = field(default_factory=lambda: ChatTemplate(None, None))
    framer: None = None
    cache: None = None
    tokens_per_second: float | None = None
    tokenizer: Tokenizer = field(
        default_factory=lambda: Tokenizer(tiny.wordpiece(), max_model_len=64, vocab_size=113)
    )
    rack: Rack | None = None

    def of(self, model: ModelInfo) -> Self:
        return replace(self, model=model)


@dataclass
class Scene:
    """An engine, and fronts of it in the same process."""

    local: AsyncEngine
    runner: StandIn
    gates: list[Gate]
    fronts: list[AsyncEngine]

    def ask(
        self,
        *ids: list[int],
        front: int = 0,
        task: Task = "embed",
        timeout: float | None = None,
        **others: Any,
    ) -> asyncio.Task[PoolingResult]:
        """`timeout` in seconds from now; `others` are terms."""
        terms = Terms(deadline=None if timeout is None else time.monotonic() + timeout, **others)
        pool = self.fronts[front].pool(list(ids), PoolingParams(), TokenizationParams(), terms, task=task)
        return asyncio.ensure_future(pool)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Nothing that is asked meanwhile runs."""
        self.runner.gate.clear()
        try:
            yield
        finally:
            self.runner.gate.set()

    @property
    def pending(self) -> int:
        core = self.local.core
        assert isinstance(core, Core)
        return len(core._pending)


async def no_reply(question: str) -> bytes:
    return f"asked {question}".encode()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def scene(
    fronts: int = 1, config: EngineConfig | None = None, rack: Rack | None = None
) -> AsyncIterator[Scene]:
    config = config or EngineConfig()
    built = Built(rack=rack)
    local = AsyncEngine(config, build=lambda _: built)
    await local.start()
    built.runners[0].ran = 0
    packed = parcel.pack(built)
    s = Scene(local, built.runners[0], [], [])
    for _ in range(fronts):
        ours, theirs = socket.socketpair()
        s.gates.append(Gate(local.core, no_reply))
        await s.gates[-1].open(ours)
        s.fronts.append(AsyncEngine(config, core=RemoteCore(theirs, no_reply)))
        s.gates[-1].hand_over(packed)
        await s.fronts[-1].start()
    try:
        yield s
    finally:
        s.runner.gate.set()
        for front in s.fronts:
            await front.stop(0)
        await local.stop(5)


async def test_answers_are_those_of_one_process() -> None:
    async with scene() as s:
        prompts = [[i % 90] * (1 + i * 7 % 30) for i in range(40)]
        for task in ("embed", "token_embed", ("embed", "token_embed")):
            here, there = [
                await engine.pool(prompts, PoolingParams(), TokenizationParams(), task=task)
                for engine in (s.local, s.fronts[0])
            ]
            assert (here.prompt_token_ids, here.cached) == (there.prompt_token_ids, there.cached)
            for one, other in zip(here.rows, there.rows, strict=True):
                assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


async def test_texts_are_tokenized_in_the_front() -> None:
    async with scene() as s:
        result = await s.fronts[0].pool(["the cat", "a"], PoolingParams(), TokenizationParams())
        assert result.prompt_token_ids == s.local.core.parts.tokenizer.encode(["the cat", "a"])  # type: ignore[union-attr]
        assert result.timings.tokenize > 0
        assert s.fronts[0].model == MODEL


async def test_errors_of_the_model_and_of_the_request_are_told_apart() -> None:
    async with scene() as s:
        with pytest.raises(InferenceFailed, match="poisoned"):
            await s.ask([POISON])
        with pytest.raises(UnsupportedTask):
            await s.ask([1], task="classify")
        assert (await s.ask([1, 2])).rows[0].tolist() == [2, 3]


async def test_a_deadline_is_kept_by_the_engine() -> None:
    async with scene() as s:
        with s.busy(), pytest.raises(DeadlineExceeded):
            await s.ask([1], timeout=0.05)
        await until(lambda: not s.pending)


async def test_who_leaves_takes_its_request_along() -> None:
    async with scene() as s:
        with s.busy():
            first = s.ask([1])
            await until(s.runner.running.is_set)
            waiting = s.ask([2], [3])
            await until(lambda: s.pending == 2)
            waiting.cancel()
            await until(lambda: s.pending == 1)
            assert s.local.waiting_sequences == 0
        assert (await first).rows[0].tolist() == [1, 1]
        assert s.runner.ran == 1


async def test_progress_is_told() -> None:
    async with scene() as s:
        told: list[int] = []
        await s.ask([1], [2], [3], on_progress=told.append)
        assert sum(told) == 3


async def test_equal_prompts_of_two_fronts_are_run_once() -> None:
    async with scene(fronts=2) as s:
        with s.busy():
            blocker = s.ask([1])
            await until(s.runner.running.is_set)
            twins = [s.ask([5, 6], front=0), s.ask([5, 6], front=1)]
            await until(lambda: s.pending == 3)
        for one in twins:
            assert (await one).rows[0].tolist() == [2, 11]
        await blocker
        assert s.runner.ran == 2


async def test_prompts_under_two_salts_are_not_shared() -> None:
    async with scene(fronts=2, config=EngineConfig(cache_size=1 << 20)) as s:
        await s.ask([5, 6], front=0, cache_salt="a")
        await s.ask([5, 6], front=1, cache_salt="b")
        await s.ask([5, 6], front=1, cache_salt="a")
        assert s.runner.ran == 2


async def test_a_full_queue_is_refused_before_anything_is_tokenized() -> None:
    async with scene(config=EngineConfig(max_queued_tokens=10)) as s:
        with s.busy():
            asked = [s.ask([1])]
            await until(s.runner.running.is_set)
            asked.append(s.ask([7] * 10))
            await until(lambda: s.fronts[0].waiting_tokens == 10)
            with pytest.raises(Overloaded, match="The queue is full: 10 tokens wait") as refused:
                await s.fronts[0].pool(["the cat"], PoolingParams(), TokenizationParams())
            assert refused.value.retry_after >= 1
            tokenizer: Any = s.fronts[0].core.parts.tokenizer  # type: ignore[union-attr]
            tokenizer.prepare = None  # who called it would find out
            with pytest.raises(Overloaded):
                await s.fronts[0].pool(["the cat"], PoolingParams(), TokenizationParams())
            del tokenizer.prepare
        await asyncio.gather(*asked)
        await until(lambda: not s.fronts[0].waiting_tokens)
        assert (await s.ask([1, 2])).rows[0].tolist() == [2, 3]


async def test_what_the_front_did_not_know_yet_the_engine_refuses() -> None:
    async with scene(fronts=2, config=EngineConfig(max_queued_tokens=10)) as s:
        with s.busy():
            asked = [s.ask([1])]
            await until(s.runner.running.is_set)
            both = [s.ask([8] * 9, front=0), s.ask([9] * 9, front=1)]  # neither has heard of the other
            done, waiting = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            assert isinstance(done.pop().exception(), Overloaded)
        await asyncio.gather(*asked, *waiting)


async def test_a_front_that_dies_takes_its_requests_along_and_no_others() -> None:
    async with scene(fronts=2) as s:
        with s.busy():
            blocker = s.ask([1], front=1)
            await until(s.runner.running.is_set)
            lost = s.ask([2], [3], front=0)
            await until(lambda: s.pending == 2)
            core: Any = s.fronts[0].core
            core._line._transport.abort()
            await until(lambda: s.pending == 1)
            with pytest.raises(EngineDead):
                await lost
        assert (await blocker).rows[0].tolist() == [1, 1]
        assert (await s.ask([4], front=1)).rows[0].tolist() == [1, 4]


async def test_when_the_engines_process_is_gone_all_that_is_pending_is_told() -> None:
    async with scene() as s:
        with s.busy():
            asked = [s.ask([1]), s.ask([2])]
            await until(lambda: s.pending == 2)
            s.gates[0].line._transport.abort()
            for one in asked:
                with pytest.raises(EngineDead):
                    await one
        await s.fronts[0].died()
        assert s.fronts[0].state == "dead"
        with pytest.raises(EngineDead):
            await s.ask([3])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_lost_worker_is_the_end_for_fronts_too() -> None:
    async with scene() as s:
        with pytest.raises(EngineDead):
            await s.ask([DEADLY])
        async with asyncio.timeout(5):
            await s.fronts[0].died()
        assert s.fronts[0].state == "dead"


async def test_draining_is_heard_of_and_all_that_was_let_in_is_answered() -> None:
    async with scene() as s:
        with s.busy():
            accepted = s.ask([1])
            await until(lambda: s.pending == 1)
            s.local.drain()
            late = s.ask([3])  # the front has not heard of it yet
            await until(lambda: s.fronts[0].state == "draining")
            later = s.ask([2])  # its body was on its way
            await until(lambda: s.pending == 3)
        assert [(await one).rows[0].tolist() for one in (accepted, late, later)] == [[1, 1], [1, 3], [1, 2]]
        assert await s.local.stop(5) is True
        await until(lambda: s.fronts[0].state == "stopped")
        with pytest.raises(Draining):
            await s.ask([4])


async def test_a_front_is_not_ready_before_the_engine_is() -> None:
    ours, theirs = socket.socketpair()
    remote = RemoteCore(theirs, no_reply)
    front = AsyncEngine(EngineConfig(), core=remote)
    assert front.state == "starting"
    starting = asyncio.ensure_future(front.start())
    await asyncio.sleep(0.01)
    with pytest.raises(NotReady):
        await front.pool(["a"], PoolingParams(), TokenizationParams())
    ours.close()
    with pytest.raises(EngineDead):
        await starting
    await remote.over()


async def test_both_ends_may_ask() -> None:
    async with scene() as s:
        remote = s.fronts[0].core
        assert isinstance(remote, RemoteCore)
        assert await remote.ask("how are you") == b"asked how are you"
        assert await s.gates[0].ask("and you") == b"asked and you"
        s.gates[0].leave()
        await remote.over()


async def test_a_question_that_cannot_be_answered_fails_alone() -> None:
    async def refuse(question: str) -> bytes:
        raise ValueError(f"nobody answers {question}")

    async with scene() as s:
        s.gates[0]._reply = refuse
        remote: Any = s.fronts[0].core
        with pytest.raises(RuntimeError, match="nobody answers this"):
            await remote.ask("this")
        assert (await s.ask([1])).rows[0].tolist() == [1, 1]


async def test_an_engine_whose_answers_are_not_read_reads_no_more_requests() -> None:
    """Else those that a stuck front sent before would pile up here as answers."""
    async with scene() as s:
        line: Any = s.gates[0].line
        remote: Any = s.fronts[0].core
        remote._line._transport.pause_reading()
        asked = [s.ask([i % 90] * 64, task="token_embed") for i in range(4000)]
        await until(lambda: not line._transport.is_reading())
        remote._line._transport.resume_reading()
        results = await asyncio.gather(*asked)
        assert [result.rows[0].shape for result in results] == [(64, 2)] * 4000


async def test_whatever_happens_each_request_gets_one_answer() -> None:
    """Many at once from two fronts: answered, failed, cancelled, too late."""
    random = np.random.default_rng(5)
    async with scene(fronts=2) as s:
        asked = []
        for i in range(300):
            ids = [int(token) for token in random.integers(0, 90, random.integers(1, 30))]
            if i % 11 == 0:
                ids[0] = POISON
            asked.append((ids, s.ask(ids, front=i % 2, timeout=0.0005 if i % 13 == 0 else None)))
            if i % 7 == 0:
                asked[random.integers(len(asked))][1].cancel()
            if i % 20 == 0:
                await asyncio.sleep(0.001)
        for ids, one in asked:
            try:
                result = await one
            except asyncio.CancelledError:
                continue
            except DeadlineExceeded:
                continue
            except InferenceFailed:
                assert POISON in ids
                continue
            assert result.rows[0].tolist() == [len(ids), sum(ids)]
        await until(lambda: not s.pending)
        assert s.local.waiting_sequences == 0
        assert not any(gate._tasks for gate in s.gates)


class Hooks:
    """A rack on which anything hangs."""

    def hang(self, slot: int, name: str, path: str) -> None: ...

    def drop(self, slot: int) -> None: ...


async def test_a_front_knows_the_adapters_that_have_come_once_it_has_read_what_it_is_told() -> None:
    async with scene(rack=Hooks()) as s:
        assert (s.fronts[0].model.adapters, s.fronts[0].model.lora_modules) == ({}, {})
        await s.local.change(changes.LoadAdapter("a", "/a"))
        s.gates[0].tell()
        await s.gates[0].ask("anything")  # what was sent before has been read by then
        assert (s.fronts[0].model.adapters, s.fronts[0].model.lora_modules) == ({"a": 1}, {"a": "/a"})
        assert (await s.ask([1], adapter="a")).rows[0].tolist() == [1, 1]


async def test_a_front_that_has_not_heard_of_an_exchange_is_told_before_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it could not know that another one goes by that name, and would refuse its client."""
    monkeypatch.setattr("carpool.engine.gate.TELL_SECONDS", 60.0)
    async with scene(rack=Hooks()) as s:
        core = s.local.core
        assert isinstance(core, Core)
        assert core._roster is not None
        await s.local.change(changes.LoadAdapter("a", "/a"))
        s.gates[0].tell()
        await s.gates[0].ask("anything")
        await s.local.change(changes.LoadAdapter("a", "/b", replace=True))
        await until(lambda: core._roster and 1 not in core._roster.slots)
        assert s.fronts[0].model.adapters == {"a": 1}
        assert (await s.ask([5, 6], adapter="a")).rows[0].tolist() == [2, 11]
        await s.local.change(changes.UnloadAdapter("a"))
        await until(lambda: core._roster and 2 not in core._roster.slots)
        assert s.fronts[0].model.adapters == {"a": 2}
        with pytest.raises(UnknownAdapter, match="was unloaded while this request was on its way"):
            await s.ask([1], adapter="a")


async def test_a_front_that_still_unpacks_takes_them_then() -> None:
    core = RemoteCore(socket.socketpair()[0], no_reply)
    core.received(Adapters({"a": 1}, {"a": "/a"}), b"")
    core.parts = Built()
    core._take_adapters()
    assert core.parts.model.lora_modules == {"a": "/a"}


async def test_a_change_goes_to_the_engines_process() -> None:
    asked = []

    async def reply(question: str) -> bytes:
        asked.append(changes.read(question))
        return b""

    ours, theirs = socket.socketpair()
    local = AsyncEngine(EngineConfig(), build=lambda _: Built())
    await local.start()
    gate = Gate(local.core, reply)
    await gate.open(ours)
    front = AsyncEngine(EngineConfig(), core=RemoteCore(theirs, no_reply))
    gate.hand_over(parcel.pack(Built()))
    await front.start()
    told: list[changes.Change] = [
        changes.LoadAdapter("a", "/a", replace=True),
        changes.UnloadAdapter("a"),
        changes.ResetCaches(),
    ]
    for change in told:
        await front.change(change)
    assert asked == told
    await front.stop(0)
    await local.stop(5)
