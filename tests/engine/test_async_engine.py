"""AsyncEngine over stand-in runners: whatever comes, goes, breaks or hangs, each request gets exactly one answer."""

from __future__ import annotations

import asyncio
import builtins
import gc
import random
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from carpool.engine import fleet, staging
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.batch import Batch
from carpool.engine.build import build
from carpool.engine.cache.blocks import BlockPool
from carpool.engine.cache.cache import Cache
from carpool.engine.cache.paging import Paging
from carpool.engine.changes import Change, LoadAdapter, ResetCaches, UnloadAdapter
from carpool.engine.chat import ChatTemplate
from carpool.engine.config import EngineConfig
from carpool.engine.core import Core, _build
from carpool.engine.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    EmptyInput,
    EngineDead,
    InferenceFailed,
    InputTooLong,
    InvalidInput,
    InvalidParameter,
    NotReady,
    Overloaded,
    Unavailable,
    UnknownAdapter,
    UnsupportedTask,
)
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import Matryoshka, PoolingParams, Task, TokenizationParams
from carpool.engine.preparation import Rack
from carpool.engine.prepared import Prepared
from carpool.engine.request import Request
from carpool.engine.sequence import Sequence
from carpool.engine.terms import Terms
from carpool.engine.tokenizer import Tokenizer
from carpool.engine.worker import Landing, Row

# Token ids: the first fails its sequence, the second kills the worker's thread, the third is nobody else's.
POISON, DEADLY, BUSY = 91, 92, 93
TOKENIZATION = TokenizationParams()
MODEL = ModelInfo(
    root="here/stand-in", architectures=("StandIn",), tasks=frozenset[Task]({"embed"}), max_model_len=64,
    vocab_size=113, embedding_size=2, matryoshka=Matryoshka(2), pooling="mean", normalize=False, dtype="float32",
    device="cpu", workers=1, parameters=0, max_num_batched_tokens=64, max_num_seqs=8, attention="none",
)  # fmt: skip


class StandIn:
    """A runner that answers each sequence with (its length, the sum of its ids), when the gate is open.

    Of depth 1 it computes at launch, as a CPU does; of more, at landing, as a device would meanwhile.
    """

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()  # set while a batch is inside
        self.batches: list[list[list[int]]] = []
        self.adapters: list[int] = []
        self.error_at_bind: BaseException | None = None
        self.slow = 0.0

    def bind(self) -> None:
        if self.error_at_bind:
            raise self.error_at_bind

    def launch(self, batch: Batch) -> Landing:
        if self.depth > 1:
            return lambda: self.run(batch)
        rows = self.run(batch)
        return lambda: rows

    def run(self, batch: Batch) -> list[Row]:
        ids = [seq.token_ids for seq in batch.sequences]
        self.batches.append(ids)
        self.adapters += [seq.adapter for seq in batch.sequences]
        self.running.set()
        assert self.gate.wait(30), "a test forgot to open the gate"
        if self.slow:
            time.sleep(self.slow)
        self.running.clear()
        if any(DEADLY in row for row in ids):
            raise SystemExit("the thread is gone")
        return [
            InferenceFailed("poisoned") if POISON in row else answer(row) if count == seq.remaining else None
            for row, seq, count in zip(ids, batch.sequences, batch.counts, strict=True)
        ]


def answer(ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([len(ids), sum(ids)], dtype=np.float32)


@dataclass
class BuiltStandIn:
    runners: list[StandIn] = field(default_factory=lambda: [StandIn()])
    model: ModelInfo = MODEL
    chat: ChatTemplate = field(default_factory=lambda: ChatTemplate(None, None))
    framer: None = None
    cache: Cache | None = None
    tokens_per_second: float | None = None
    tokenizer: Tokenizer = field(
        default_factory=lambda: Tokenizer(tiny.wordpiece(), max_model_len=64, vocab_size=113)
    )
    rack: Rack | None = None

    def of(self, model: ModelInfo) -> Self:
        return replace(self, model=model)


@dataclass
class Ledger:
    """An observer that keeps count. `shared` are those that were given the result of a twin."""

    rode: int = 0
    shared: int = 0
    tokens: int = 0
    cancelled: int = 0
    batches: int = 0

    def batch_done(self, tokens: int, sequences: int, forward_seconds: float) -> None:
        assert forward_seconds >= 0
        self.batches += 1
        self.rode += sequences
        self.tokens += tokens

    def sequences_cancelled(self, count: int) -> None:
        assert count > 0
        self.cancelled += count


@dataclass
class Scene:
    """A running engine, its parts, and a short way to ask it something."""

    engine: AsyncEngine
    built: BuiltStandIn
    ledger: Ledger

    @property
    def runner(self) -> StandIn:
        return self.built.runners[0]

    @property
    def fleet(self) -> fleet.Fleet:
        fleet = core(self.engine)._fleet
        assert fleet is not None
        return fleet

    @property
    def held(self) -> list[int]:
        """How many batches each worker holds that has any."""
        return list(map(len, self.fleet.held.values()))

    def ask(
        self, *ids: list[int], task: Task = "embed", timeout: float | None = None, **others: Any
    ) -> asyncio.Task[PoolingResult]:
        """`timeout` in seconds from now; `others` are terms."""
        terms = Terms(deadline=None if timeout is None else time.monotonic() + timeout, **others)
        return asyncio.ensure_future(
            self.engine.pool(list(ids), PoolingParams(), TOKENIZATION, terms, task=task)
        )

    async def occupy(self) -> asyncio.Task[PoolingResult]:
        """Shut the gates and give one worker a batch to stand there with."""
        for runner in self.built.runners:
            runner.gate.clear()
        task = self.ask([BUSY])
        await until(lambda: any(runner.running.is_set() for runner in self.built.runners))
        return task

    def count_twins(self) -> None:
        """Have the ledger count those that are given another's result."""
        scheduler = core(self.engine)._scheduler
        assert scheduler is not None
        take = scheduler.take_twins

        def counted(seq: Sequence) -> list[Sequence]:
            twins = take(seq)
            self.ledger.shared += len(twins)
            return twins

        scheduler.take_twins = counted  # type: ignore[method-assign]

    def open(self) -> None:
        for runner in self.built.runners:
            runner.gate.set()


async def until(true: Callable[[], object]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0)


@asynccontextmanager
async def scene(
    workers: int = 1,
    model: ModelInfo = MODEL,
    config: EngineConfig | None = None,
    depth: int = 1,
    cache: Cache | None = None,
    rack: Rack | None = None,
) -> AsyncIterator[Scene]:
    built = BuiltStandIn([StandIn(depth) for _ in range(workers)], model, cache=cache, rack=rack)
    ledger = Ledger()
    engine = AsyncEngine(config or EngineConfig(), build=lambda _: built)
    engine.observer = ledger
    await engine.start()
    for runner in built.runners:
        runner.batches.clear()  # warm-up is over
    ledger.rode = ledger.tokens = ledger.batches = 0
    try:
        yield Scene(engine, built, ledger)
    finally:
        for runner in built.runners:
            runner.gate.set()
        await engine.stop(5)


def core(engine: AsyncEngine) -> Core:
    assert isinstance(engine.core, Core)
    return engine.core


def assert_nothing_left(engine: AsyncEngine) -> None:
    assert (engine.waiting_tokens, engine.waiting_sequences) == (0, 0)
    assert not core(engine)._pending
    assert core(engine)._pending.all_answered.is_set()
    scheduler = core(engine)._scheduler
    assert scheduler is not None
    assert not scheduler._queue._requests
    assert not scheduler._queue._clients
    if engine.state == "ready":  # else batches were left behind
        twins = scheduler._twins
        assert (twins._waiting, twins._resting) == ({}, {})
        assert not [ride for ride in twins._rides.values() if ride.resting]


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_answers_come_in_the_order_of_the_prompts() -> None:
    async with scene() as s:
        prompts = [[i % 90] * (1 + i * 7 % 30) for i in range(40)]  # lengths that the scheduler will sort
        result = await s.ask(*prompts)
        assert result.prompt_token_ids == prompts
        assert result.prompt_tokens == sum(map(len, prompts))
        for ids, row in zip(prompts, result.rows, strict=True):
            np.testing.assert_array_equal(row, answer(ids))
        assert_nothing_left(s.engine)


async def test_texts_are_tokenised_on_the_way() -> None:
    async with scene() as s:
        result = await s.engine.pool(["the cat", "a"], PoolingParams(), TOKENIZATION)
        assert result.prompt_token_ids == s.built.tokenizer.encode(["the cat", "a"])
        assert [row[0] for row in result.rows] == [4, 3]


async def test_long_work_of_the_tokenizer_is_kept_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene() as s:
        threads = []
        prepare = s.built.tokenizer.prepare

        def watched(*args: Any) -> Prepared:
            threads.append(threading.current_thread())
            return prepare(*args)

        monkeypatch.setattr(s.built.tokenizer, "prepare", watched)
        for texts in (["a"], ["a " * 50] * 100):
            await s.engine.pool(texts, PoolingParams(), TOKENIZATION)
        assert threads[0] is threading.main_thread()
        assert threads[1] is not threading.main_thread()


async def test_requests_of_one_turn_of_the_loop_ride_together() -> None:
    async with scene() as s:
        await asyncio.gather(*(s.ask([i, i]) for i in range(8)))
        assert [len(batch) for batch in s.runner.batches] == [8]


async def test_what_arrives_while_workers_are_busy_rides_together_next() -> None:
    async with scene() as s:
        first = await s.occupy()
        rest = [s.ask([i]) for i in range(5)]
        await until(lambda: s.engine.waiting_sequences == 5)
        s.open()
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in s.runner.batches] == [1, 5]


async def test_idle_workers_share_what_arrives() -> None:
    async with scene(workers=2, model=replace(MODEL, max_num_batched_tokens=4096, max_num_seqs=256)) as s:
        await s.ask(*[[i] * 50 for i in range(20)])
        assert [len(runner.batches) for runner in s.built.runners] == [1, 1]


async def test_a_short_queue_is_not_split_over_the_places_of_one_worker() -> None:
    async with scene(depth=2) as s:
        first = await s.occupy()
        rest = [s.ask([i]) for i in range(7)]
        await until(lambda: s.engine.waiting_sequences == 7)
        await asyncio.sleep(0.01)
        assert s.engine.waiting_sequences == 7, "they wait for company, since less than a batch waits"
        s.open()
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in s.runner.batches] == [1, 7]


async def test_full_batches_are_ready_before_the_device_is() -> None:
    """Two under way and one at the door, at the most: what comes later waits where it can still be sorted."""
    async with scene(depth=2) as s:
        first = await s.occupy()
        rest = [s.ask([i]) for i in range(4 * 8 + 3)]
        await until(lambda: s.engine.waiting_sequences == 2 * 8 + 3)
        assert s.held == [3]
        s.open()
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in s.runner.batches] == [1, 8, 8, 8, 8, 3]
        assert (s.held, s.fleet.idle) == ([], s.fleet.workers)
        assert not s.fleet.watchdogs


async def test_full_batches_go_where_the_fewest_are() -> None:
    async with scene(workers=2, depth=2) as s:
        for runner in s.built.runners:
            runner.gate.clear()
        rest = [s.ask([i]) for i in range(4 * 8)]
        await until(lambda: sum(s.held) == 4)
        assert s.held == [2, 2]
        s.open()
        await asyncio.gather(*rest)


async def test_progress_adds_up_to_the_number_of_prompts() -> None:
    async with scene() as s:
        told: list[int] = []
        await s.ask(*[[1] * 20] * 9, on_progress=told.append)
        assert sum(told) == 9


async def test_timings_cover_the_wait() -> None:
    async with scene() as s:
        first = await s.occupy()
        second = s.ask([1])
        await until(lambda: s.engine.waiting_sequences)
        await asyncio.sleep(0.02)
        s.open()
        await first
        timings = (await second).timings
        assert timings.queue >= 0.02
        assert min(timings.tokenize, timings.forward) >= 0


async def test_the_observer_sees_every_token_and_sequence() -> None:
    async with scene() as s:
        await asyncio.gather(s.ask([1] * 60, [2] * 3), s.ask([3] * 7))
        assert (s.ledger.tokens, s.ledger.rode, s.ledger.cancelled) == (70, 3, 0)
        assert s.ledger.batches == len(s.runner.batches)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(1, 64), min_size=1, max_size=12),  # lengths
            st.sampled_from(["whole", "whole", "poisoned", "cancelled", "hurried"]),
            st.integers(0, 6),  # turns of the loop before the next one
        ),
        min_size=1,
        max_size=25,
    ),
    workers=st.integers(1, 3),
    depth=st.integers(1, 3),
)
def test_each_request_gets_exactly_one_answer(
    requests: list[tuple[list[int], str, int]], workers: int, depth: int
) -> None:
    async def story() -> None:
        async with scene(workers, depth=depth) as s:
            tasks = []
            submitted = 0
            s.count_twins()
            for lengths, fate, turns in requests:
                prompts = [[n] * n for n in lengths]
                if fate == "poisoned":
                    prompts[-1] = [POISON]
                submitted += len(prompts)
                task = s.ask(*prompts, timeout=0.0005 if fate == "hurried" else None)
                tasks.append(task)
                for _ in range(turns):
                    await asyncio.sleep(0)
                if fate == "cancelled":
                    submitted -= len(prompts) * (turns == 0)  # it had not even begun
                    task.cancel()
            answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
            for (lengths, fate, _), given_answer in zip(requests, answers, strict=True):
                if isinstance(given_answer, PoolingResult):
                    assert fate != "poisoned"
                    assert [row[0] for row in given_answer.rows] == lengths
                else:
                    expected = {
                        "poisoned": InferenceFailed,
                        "cancelled": asyncio.CancelledError,
                        "hurried": DeadlineExceeded,
                    }
                    assert isinstance(given_answer, expected[fate])
            await until(lambda: len(s.fleet.idle) == workers)
            assert_nothing_left(s.engine)
            hurried = any(
                fate == "hurried" for _, fate, _ in requests
            )  # these may end before they are queued
            gone = s.ledger.rode + s.ledger.cancelled + s.ledger.shared
            assert gone <= submitted if hurried else gone == submitted

    asyncio.run(story())


# ── cancellation ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_cancelled_request_leaves_the_queue_and_nobody_else_does() -> None:
    async with scene() as s:
        first = await s.occupy()
        leaver, stayer = s.ask(*[[5] * 20] * 200), s.ask([6] * 3)
        await until(lambda: s.engine.waiting_sequences == 201)
        leaver.cancel()
        await until(leaver.done)
        assert (s.engine.waiting_tokens, s.engine.waiting_sequences) == (3, 1)
        assert s.ledger.cancelled == 200
        s.open()
        await first
        assert (await stayer).rows[0].tolist() == [3, 18]
        assert s.ledger.rode == 2
        assert_nothing_left(s.engine)


async def test_a_request_cancelled_while_it_runs_costs_its_batch_nothing() -> None:
    async with scene() as s:
        s.runner.gate.clear()
        leaver, stayer = s.ask([1]), s.ask([2])
        await until(s.runner.running.is_set)
        leaver.cancel()
        await until(leaver.done)
        s.open()
        assert (await stayer).rows[0].tolist() == [1, 2]
        assert s.ledger.cancelled == 0, "it was running, not waiting"
        assert_nothing_left(s.engine)


# ── failure of one ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_failing_sequence_fails_its_request_alone() -> None:
    async with scene() as s:
        bad, good = s.ask([1], [POISON], [2]), s.ask([3])
        with pytest.raises(InferenceFailed, match="poisoned"):
            await bad
        assert (await good).rows[0].tolist() == [1, 3]
        assert len(s.runner.batches) == 1, "they rode together"
        assert s.engine.state == "ready"


async def test_what_waits_of_a_failed_request_does_not_run() -> None:
    async with scene() as s:
        with pytest.raises(InferenceFailed):
            await s.ask([POISON], *[[i] * 60 for i in range(50)])
        await until(lambda: len(s.fleet.idle) == 1)
        assert len(s.runner.batches) <= 2
        assert s.ledger.rode + s.ledger.cancelled == 51


# ── the same work ────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_several_ask_at_once_is_run_once() -> None:
    async with scene() as s:
        results = await asyncio.gather(*(s.ask([i % 3, 7], [i % 3, 7]) for i in range(12)))
        assert sorted(ids for batch in s.runner.batches for ids in batch) == [[0, 7], [1, 7], [2, 7]]
        for i, result in enumerate(results):
            assert [row.tolist() for row in result.rows] == [answer([i % 3, 7]).tolist()] * 2
            assert result.prompt_tokens == 4
            assert result.cached_tokens == 0
        assert_nothing_left(s.engine)


async def test_what_is_asked_while_it_runs_is_not_run_again() -> None:
    async with scene() as s:
        first = await s.occupy()
        told: list[int] = []
        again = s.ask([BUSY], on_progress=told.append)
        more = s.ask([BUSY], [5])
        await until(lambda: s.engine.waiting_sequences == 1)
        s.open()
        for result in await asyncio.gather(first, again, more):
            assert result.rows[0].tolist() == [1, BUSY]
        assert s.runner.batches == [[[BUSY]], [[5]]]
        assert told == [1]
        assert again.result().timings.queue == 0, "it was under way already"


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("leavers", [[0], [1], [2], [0, 1], [1, 0], [0, 2], [2, 1], [0, 1, 2], [2, 1, 0]])
async def test_those_who_leave_do_not_take_the_work_along(leavers: list[int], running: bool) -> None:
    async with scene() as s:
        first = await s.occupy()
        ids = [BUSY] if running else [5]
        tasks = [first, s.ask(ids), s.ask(ids)] if running else [s.ask(ids) for _ in range(3)]
        await until(lambda: len(core(s.engine)._pending) == (3 if running else 4))
        for i in leavers:
            tasks[i].cancel()
            await until(tasks[i].done)
        s.open()
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        for i, result in enumerate(answers[1:]):
            assert isinstance(result, asyncio.CancelledError if i in leavers else PoolingResult)
        await until(lambda: len(s.fleet.idle) == 1)
        rode = [row for batch in s.runner.batches for row in batch]
        assert rode.count(ids) == (1 if running or len(leavers) < 3 else 0)
        assert_nothing_left(s.engine)


async def test_each_has_its_own_deadline() -> None:
    async with scene() as s:
        first = await s.occupy()
        hurried, patient, riding = (
            s.ask([5], timeout=0.02),
            s.ask([5], timeout=30),
            s.ask([BUSY], timeout=0.02),
        )
        for late in (hurried, riding):
            with pytest.raises(DeadlineExceeded):
                await late
        assert s.engine.waiting_sequences == 1
        s.open()
        await asyncio.gather(first, patient)
        assert s.runner.batches == [[[BUSY]], [[5]]]
        assert_nothing_left(s.engine)


async def test_a_request_that_fails_for_another_prompt_leaves_its_twins_alone() -> None:
    async with scene() as s:
        first = await s.occupy()
        bad, good = s.ask([POISON], [5]), s.ask([5])
        await until(lambda: s.engine.waiting_sequences == 3)
        s.open()
        with pytest.raises(InferenceFailed):
            await bad
        assert (await good).rows[0].tolist() == [1, 5]
        await first


async def test_work_that_fails_fails_for_all_who_asked_for_it_each_with_an_error_of_its_own() -> None:
    async with scene() as s:
        tasks = [s.ask([POISON]) for _ in range(3)]
        failures = await asyncio.gather(*tasks, s.ask([1]), return_exceptions=True)
        assert isinstance(failures.pop(), PoolingResult)
        assert [type(failure) for failure in failures] == [InferenceFailed] * 3
        assert len({id(failure) for failure in failures}) == 3
        assert [row for batch in s.runner.batches for row in batch].count([POISON]) == 1
        with pytest.raises(InferenceFailed):
            await s.ask([POISON])
        assert [row for batch in s.runner.batches for row in batch].count([POISON]) == 2, (
            "it was not remembered"
        )
        assert_nothing_left(s.engine)


async def test_a_twin_of_higher_priority_does_not_wait_behind_one_of_lower() -> None:
    async with scene() as s:
        first = await s.occupy()
        low = s.ask([5] * 60, priority=9)
        others = [s.ask([10 + i] * 60) for i in range(3)]
        high = s.ask([5] * 60, priority=-1)
        await until(lambda: s.engine.waiting_sequences == 5)
        s.open()
        await asyncio.gather(first, low, high, *others)
        assert [batch[0][0] for batch in s.runner.batches] == [BUSY, 5, 10, 11, 12]


async def test_those_who_rest_are_run_when_their_lead_expires_between_its_chunks() -> None:
    """The loop was held up: that they wait again is found out when the lead's turn comes, with every worker idle."""
    cache = Cache(Paging(BlockPool(40, 4), 16), frozenset[Task]({"embed"}), finds_prefixes=True)
    async with scene(cache=cache) as s:
        s.runner.gate.clear()
        lead = s.ask([5] * 60, timeout=0.05)
        await until(s.runner.running.is_set)
        twin = s.ask([5] * 60)
        await until(lambda: len(core(s.engine)._pending) == 2)
        assert s.engine.waiting_sequences == 0, "it rests"
        s.open()
        time.sleep(0.1)
        with pytest.raises(DeadlineExceeded):
            await lead
        assert (await asyncio.wait_for(twin, 5)).rows[0].tolist() == [60, 300]
        assert_nothing_left(s.engine)


@pytest.mark.parametrize("cache_size", [0, 1 << 20])
async def test_only_what_has_the_same_result_is_shared(cache_size: int) -> None:
    """Neither tenants, nor adapters, nor ways of finishing a vector are mixed up, at once or later."""
    kinds: list[dict[str, Any]] = [
        {}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"adapter": "x"}, {"adapter": "y"}, {"task": "classify"},
    ]  # fmt: skip
    model = replace(MODEL, adapters={"x": 1, "y": 2}, tasks=frozenset[Task]({"embed", "classify"}))
    async with scene(model=model, config=EngineConfig(cache_size=cache_size)) as s:
        await asyncio.gather(*(s.ask([5], **kind) for kind in kinds for _ in range(2)))
        plain = PoolingParams(use_activation=False)
        await s.engine.pool([[5]], plain, TOKENIZATION)
        assert sum(map(len, s.runner.batches)) == len(kinds) + 1
        for kind in kinds:
            await s.ask([5], **kind)
        assert sum(map(len, s.runner.batches)) == (1 if cache_size else 2) * len(kinds) + 1
        assert_nothing_left(s.engine)


async def test_what_was_answered_is_answered_again_without_a_batch() -> None:
    async with scene(config=EngineConfig(cache_size=1 << 20)) as s:
        cold = await s.ask([1, 2], [3])
        first = await s.occupy()
        told: list[int] = []
        warm = await s.ask([3], [1, 2], on_progress=told.append)
        assert told == [2]
        assert [row.tolist() for row in warm.rows] == [row.tolist() for row in reversed(cold.rows)]
        assert [row.dtype for row in warm.rows] == [row.dtype for row in cold.rows]
        assert (warm.prompt_tokens, warm.prompt_token_ids) == (3, [[3], [1, 2]])
        assert warm.cached == [0, 0]
        mixed = s.ask([3], [9], [1, 2], on_progress=told.append)
        await until(lambda: s.engine.waiting_sequences)
        assert (s.engine.waiting_sequences, told) == (1, [2, 2])
        s.open()
        assert [row.tolist() for row in (await mixed).rows] == [[1, 3], [1, 9], [2, 3]]
        assert told == [2, 2, 1]
        await first
        assert s.runner.batches == [[[3], [1, 2]], [[BUSY]], [[9]]]
        stats = s.engine.result_stats
        assert stats is not None
        assert (stats.hits, stats.misses) == (4, 4)
        assert_nothing_left(s.engine)


async def test_no_results_are_kept_unless_told_to() -> None:
    async with scene() as s:
        for _ in range(2):
            await s.ask([5])
        assert len(s.runner.batches) == 2
        assert s.engine.result_stats is None


async def test_a_kept_result_needs_no_place_in_a_full_queue() -> None:
    async with scene(config=EngineConfig(max_queued_tokens=5, cache_size=1 << 20)) as s:
        await s.ask([1])
        first = await s.occupy()
        waiting = s.ask([2] * 5)
        await until(lambda: s.engine.waiting_tokens == 5)
        with pytest.raises(Overloaded):
            await s.ask([3])
        assert (await s.ask([1])).rows[0].tolist() == [1, 1]
        s.open()
        await asyncio.gather(first, waiting)
        await s.engine.stop(5)
        with pytest.raises(Draining):
            await s.ask([1])


# ── death ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_lost_worker_is_the_end_for_all() -> None:
    async with scene(workers=2) as s:
        first = await s.occupy()
        rest = [s.ask([DEADLY] * 50), *(s.ask([i] * 50) for i in range(9))]
        died = asyncio.ensure_future(s.engine.died())
        await until(lambda: s.engine.waiting_sequences == 9)
        assert not died.done()
        for runner in s.built.runners:
            runner.slow = 0.05  # or the other worker is through with all before anybody hears of it
        s.open()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        assert isinstance(answers[1], EngineDead)
        for given_answer in answers:  # some may have been answered before
            assert isinstance(given_answer, EngineDead | PoolingResult)
        assert any(isinstance(given_answer, EngineDead) for given_answer in answers[2:])
        await asyncio.wait_for(died, 5)
        assert s.engine.state == "dead"
        with pytest.raises(EngineDead):
            await s.ask([1])
        assert_nothing_left(s.engine)


async def test_a_deep_worker_that_is_lost_answers_all_that_landed_and_no_more() -> None:
    async with scene(depth=2) as s:
        first = await s.occupy()
        landed = [s.ask([i]) for i in range(8)]
        lost = [s.ask([DEADLY]), *(s.ask([8 + i]) for i in range(3 * 8))]
        await until(lambda: s.held == [3])
        s.open()
        answers = await asyncio.gather(first, *landed, *lost, return_exceptions=True)
        kinds = [type(given_answer) for given_answer in answers]
        assert kinds == [PoolingResult] * 9 + [EngineDead] * 25
        assert s.engine.state == "dead"
        assert_nothing_left(s.engine)


async def test_a_hanging_worker_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene() as s:
        monkeypatch.setattr("carpool.engine.core._HUNG_AFTER_S", 0.03)
        first = await s.occupy()
        waiting = s.ask([2])
        for task in (first, waiting):
            with pytest.raises(EngineDead, match="hangs"):
                await task
        await asyncio.wait_for(s.engine.died(), 5)
        assert s.engine.state == "dead"
        s.open()
        await until(lambda: len(s.fleet.idle) == 1)  # it comes back after all: too late, and harmless
        assert s.engine.state == "dead"


async def test_a_slow_worker_is_not_a_hanging_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog watches one batch at a time, however many come."""
    async with scene() as s:
        monkeypatch.setattr("carpool.engine.core._HUNG_AFTER_S", 0.5)
        s.runner.slow = 0.02
        await s.ask(*[[i] * 60 for i in range(40)])
        assert s.engine.state == "ready"


async def test_a_batch_that_is_to_take_long_is_given_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene() as s:
        monkeypatch.setattr("carpool.engine.core._HUNG_AFTER_S", 3.0)
        made = core(s.engine)
        short, long = (Batch((Sequence(0, 0, [1] * n, PoolingParams()),)) for n in (2, 3000))
        made._admission.tokens_per_second = 100.0 * len(s.fleet.workers)
        assert made.patience(short) == 3.0
        assert made.patience(long) == 20 * 3000 / 100
        made._admission.tokens_per_second = 0.0
        assert made.patience(long) == 3.0


async def test_an_error_on_the_loop_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene() as s:
        first = await s.occupy()
        waiting = s.ask([2])
        await asyncio.sleep(0)
        monkeypatch.setattr(core(s.engine)._pending, "hand_out", None)
        s.open()
        for task in (first, waiting):
            with pytest.raises(EngineDead, match="TypeError"):
                await task
        assert s.engine.state == "dead"


async def test_who_cannot_hear_of_progress_fails_alone() -> None:
    def deaf(_rows: int) -> None:
        raise KeyError("nobody listens")

    async with scene() as s:
        first = await s.occupy()
        together = [s.ask([2], [3], on_progress=deaf), s.ask([4])]
        await asyncio.sleep(0)
        s.open()
        with pytest.raises(KeyError, match="nobody listens"):
            await together[0]
        assert len((await together[1]).rows) == len((await first).rows) == 1
        assert s.engine.state == "ready"
        assert_nothing_left(s.engine)


async def test_a_request_of_very_many_texts_lets_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("carpool.engine.core._AT_ONCE", 10)
    async with scene() as s:
        first = await s.occupy()
        bulk = s.ask(*[[i % 50] for i in range(95)])
        for turn in range(1, 10):
            await asyncio.sleep(0)
            assert s.engine.waiting_sequences == 10 * turn
        s.open()
        assert len((await bulk).rows) == 95
        await first


async def test_it_may_be_cancelled_or_fail_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carpool.engine.core._AT_ONCE", 10)
    async with scene() as s:
        first = await s.occupy()
        cancelled = s.ask(*[[i % 50] for i in range(95)])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert s.engine.waiting_sequences == 0
        late = s.ask(*[[i % 50] for i in range(95)], timeout=0.0001)
        with pytest.raises(DeadlineExceeded):
            await late
        s.open()
        await first
        assert_nothing_left(s.engine)


async def test_stopping_a_dead_engine_leaves_it_dead() -> None:
    async with scene() as s:
        with pytest.raises(EngineDead):
            await s.ask([DEADLY])
        assert await s.engine.stop(1)
        assert s.engine.state == "dead"


# ── deadlines ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_deadline_passes_while_waiting() -> None:
    async with scene() as s:
        first = await s.occupy()
        late = s.ask([2], [3], timeout=0.02)
        patient = s.ask([4], timeout=30)
        with pytest.raises(DeadlineExceeded):
            await late
        assert (s.engine.waiting_sequences, s.ledger.cancelled) == (1, 2)
        s.open()
        await asyncio.gather(first, patient)
        assert s.ledger.rode == 2


async def test_a_deadline_passes_while_running() -> None:
    async with scene() as s:
        s.runner.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await s.ask([2], timeout=0.02)
        s.open()
        await s.ask([3])
        assert_nothing_left(s.engine)


async def test_what_the_scheduler_finds_expired_is_answered_and_counted() -> None:
    """The loop was held up, so that the worker's result comes before the request's own timer."""
    async with scene() as s:
        first = await s.occupy()
        late = s.ask([2], [3], timeout=0.01)
        await until(lambda: s.engine.waiting_sequences == 2)
        s.open()
        time.sleep(0.05)
        await first
        with pytest.raises(DeadlineExceeded):
            await late
        assert s.ledger.rode == 1
        assert s.ledger.cancelled == 2
        assert_nothing_left(s.engine)


async def test_an_answered_request_leaves_no_timer_behind() -> None:
    """A million requests with an hour's patience must not stay in memory for that hour."""
    loop: Any = asyncio.get_running_loop()
    async with scene() as s:
        before = [timer for timer in loop._scheduled if not timer.cancelled()]
        await s.ask([1], timeout=3600)
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == before


@pytest.mark.parametrize("timeout", [0.0, -1.0])
async def test_a_deadline_that_has_passed_already_is_refused(timeout: float) -> None:
    async with scene() as s:
        with pytest.raises(DeadlineExceeded):
            await s.ask([1], timeout=timeout)
        late = Terms(deadline=time.monotonic() + timeout)
        with pytest.raises(DeadlineExceeded):
            await s.engine.score(["a"], ["b"], PoolingParams(), TOKENIZATION, late)
        assert s.runner.batches == []


# ── admission ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_and_an_empty_one_takes_anything() -> None:
    async with scene(config=EngineConfig(max_queued_tokens=10)) as s:
        first = await s.occupy()
        big = s.ask(*[[i] * 60 for i in range(20)])  # far more than 10, but nothing waits
        await until(lambda: s.engine.waiting_sequences == 20)
        with pytest.raises(Overloaded) as refused:
            await s.ask([1])
        assert refused.value.retry_after >= 1
        s.open()
        await asyncio.gather(first, big)
        first = await s.occupy()
        fits = [s.ask([1] * 5), s.ask([2] * 5)]
        await until(lambda: s.engine.waiting_tokens == 10)
        with pytest.raises(Overloaded):
            await s.ask([1])
        s.open()
        await asyncio.gather(first, *fits)


async def test_a_full_queue_refuses_before_it_tokenizes() -> None:
    async with scene(config=EngineConfig(max_queued_tokens=5)) as s:
        first = await s.occupy()
        waiting = s.ask([2] * 5)
        await until(lambda: s.engine.waiting_tokens == 5)
        with pytest.raises(Overloaded):
            await s.ask([MODEL.vocab_size])  # which the tokenizer would refuse
        s.open()
        await asyncio.gather(first, waiting)


async def test_by_default_the_queue_is_bounded_by_the_throughput_that_is_measured_while_more_waits() -> None:
    async with scene() as s:
        at_warm_up = s.engine.tokens_per_second
        assert at_warm_up > 0
        await s.ask([1])  # nothing waits behind it: it says nothing of what the engine can do
        assert s.engine.tokens_per_second == at_warm_up
        core(s.engine)._admission.tokens_per_second = 1.0
        first = await s.occupy()
        line = [s.ask([i % 90, i // 90]) for i in range(30)]  # 60 tokens: as many as may wait at this rate
        await until(lambda: s.engine.waiting_tokens == 60)
        with pytest.raises(Overloaded):
            await s.ask([1])
        s.open()
        await asyncio.gather(first, *line)
        assert s.engine.tokens_per_second != 1.0
        assert_nothing_left(s.engine)


@pytest.mark.parametrize(("known", "rounds"), [(None, 2), (1234.5, 1)])
async def test_the_warm_up_learns_the_throughput_unless_it_is_known(known: float | None, rounds: int) -> None:
    built = BuiltStandIn([StandIn(), StandIn()], tokens_per_second=known)
    engine = AsyncEngine(EngineConfig(), build=lambda _: built)
    await engine.start()
    ran = [len(ids) for runner in built.runners for batch in runner.batches for ids in batch]
    assert sum(ran) == rounds * 512 * 2
    assert all(runner.batches for runner in built.runners)
    assert engine.tokens_per_second == known if known else engine.tokens_per_second > 0
    assert await engine.stop(5)


def test_torch_is_imported_without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = builtins.__import__
    collecting: list[bool] = []

    def watched(name: str, *about: Any) -> Any:
        if name == "carpool.engine.build":
            collecting.append(gc.isenabled())
        return ordinary(name, *about)

    monkeypatch.setattr(builtins, "__import__", watched)
    with pytest.raises(ConfigError):
        _build(EngineConfig(model="/there/is/no/such/model"))
    assert collecting == [False]
    assert gc.isenabled()


async def test_whoever_leaves_makes_room_at_once() -> None:
    async with scene() as s:
        core(s.engine)._admission.tokens_per_second = 1.0
        first = await s.occupy()
        line = [s.ask([i % 90, i // 90]) for i in range(30)]
        await until(lambda: s.engine.waiting_tokens == 60)
        line[0].cancel()
        await until(lambda: s.engine.waiting_tokens == 58)
        follower = s.ask([7, 8])
        await until(lambda: s.engine.waiting_tokens == 60)
        s.open()
        await asyncio.gather(first, *line[1:], follower)


INVALID: list[tuple[Any, PoolingParams, dict[str, Any], type[InvalidInput], str]] = [
    ([], PoolingParams(), {}, EmptyInput, "You must pass at least one prompt"),
    ([[]], PoolingParams(), {}, EmptyInput, "no tokens"),
    ([[1] * 65], PoolingParams(), {}, InputTooLong, "64"),
    ([[1]], PoolingParams(dimensions=1), {}, InvalidParameter, "does not support matryoshka"),
    ([[1]], PoolingParams(), {"task": "token_embed"}, UnsupportedTask, "token_embed"),
]


@pytest.mark.parametrize(("prompts", "params", "options", "error", "message"), INVALID)
async def test_what_cannot_be_served_is_refused_before_it_is_queued(
    prompts: Any, params: PoolingParams, options: dict[str, Any], error: type[InvalidInput], message: str
) -> None:
    async with scene() as s:
        with pytest.raises(error, match=message):
            await s.engine.pool(prompts, params, TOKENIZATION, **options)
        assert s.runner.batches == []
        assert_nothing_left(s.engine)


async def test_token_ids_can_be_refused_outright() -> None:
    async with scene(config=EngineConfig(token_id_input=False)) as s:
        with pytest.raises(InvalidInput, match="--no-token-id-input"):
            await s.ask([1])
        await s.engine.pool(["a"], PoolingParams(), TOKENIZATION)


# ── start and stop ───────────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_is_taken_before_the_model_is_ready() -> None:
    loading = threading.Event()

    def slow_build(_: EngineConfig) -> BuiltStandIn:
        assert loading.wait(10)
        return BuiltStandIn()

    engine = AsyncEngine(EngineConfig(), build=slow_build)
    start = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        _ = engine.model
    for refused in (
        engine.pool([[1]], PoolingParams(), TOKENIZATION),
        engine.tokenize(["a"], TOKENIZATION),
        engine.detokenize([1]),
    ):
        with pytest.raises(NotReady):
            await refused
    loading.set()
    await start
    assert engine.state == "ready"
    assert await engine.stop(1)


async def test_a_refused_model_says_why_at_start() -> None:
    def no(_: EngineConfig) -> BuiltStandIn:
        raise ConfigError("not this one")

    with pytest.raises(ConfigError, match="not this one"):
        await AsyncEngine(EngineConfig(), build=no).start()


async def test_every_batch_of_a_deep_worker_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was given while another was under way; and each has its whole time once it is its turn."""
    async with scene(depth=2) as s:
        monkeypatch.setattr("carpool.engine.core._HUNG_AFTER_S", 0.4)
        s.runner.slow = 0.15
        rest = asyncio.gather(*(s.ask([i]) for i in range(8 * 8)))
        await until(lambda: s.ledger.batches == 4)
        assert s.engine.state == "ready", "none took 0.4 s, though each waited longer behind others"
        s.runner.gate.clear()
        with pytest.raises(EngineDead, match="hangs"):
            await rest
        s.open()


@pytest.mark.parametrize("how", ["every batch fails", "the thread cannot start", "the thread dies"])
async def test_a_model_that_cannot_run_a_single_batch_is_refused_at_start(how: str) -> None:
    built = BuiltStandIn()
    if how == "every batch fails":
        built.model = replace(MODEL, vocab_size=1)
        built.runners[0].run = lambda batch: [InferenceFailed("broken")] * len(batch.sequences)  # type: ignore[method-assign]
    elif how == "the thread cannot start":
        built.runners[0].error_at_bind = RuntimeError("no device")
    else:
        built.runners[0].run = lambda batch: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    engine = AsyncEngine(EngineConfig(), build=lambda _: built)
    with pytest.raises(ConfigError):
        await asyncio.wait_for(engine.start(), 5)
    assert engine.state != "ready"


async def test_a_stop_finishes_what_was_let_in_and_then_takes_no_more() -> None:
    """Who lets requests in sees from the state when to stop that; not all that are in have come to the engine yet."""
    async with scene() as s:
        first = await s.occupy()
        waiting = s.ask(*[[i] * 30 for i in range(5)])
        await until(lambda: s.engine.waiting_sequences == 5)
        stop = asyncio.ensure_future(s.engine.stop(10))
        await until(lambda: s.engine.state == "draining")
        late = s.ask([3])
        await until(lambda: s.engine.waiting_sequences == 6)
        assert not stop.done()
        s.open()
        assert await stop is True
        assert (await late).rows[0].tolist() == [1, 3]
        assert s.engine.state == "stopped"
        assert first.done()
        assert len((await waiting).rows) == 5
        assert not any(worker.is_alive() for worker in s.fleet.workers)
        with pytest.raises(Unavailable):
            await s.ask([4])


async def test_what_a_stop_cannot_finish_in_time_is_refused_not_forgotten() -> None:
    async with scene() as s:
        first = await s.occupy()
        waiting = s.ask([2])
        await until(lambda: s.engine.waiting_sequences)
        assert await s.engine.stop(0.01) is False
        for task in (first, waiting):
            with pytest.raises(Draining):
                await task
        assert_nothing_left(s.engine)
        assert s.engine.state == "stopped"


async def test_the_rows_of_a_refused_request_are_gone_before_its_caller_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are torch's memory, not to be freed by a caller's thread that Python may be ending under."""
    rows: list[weakref.ref[Any]] = []

    def answered(ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        row = np.array([len(ids), sum(ids)], dtype=np.float32)
        rows.append(weakref.ref(row))
        return row

    async with scene() as s:
        monkeypatch.setattr(sys.modules[__name__], "answer", answered)
        s.runner.slow = 0.05
        request = s.ask(*[[i] * 30 for i in range(40)])
        await until(lambda: len(rows) > 4)
        assert any(row() is not None for row in rows)
        assert await s.engine.stop(0.0) is False
        with pytest.raises(Draining) as refused:
            await request
        gc.collect()
        assert [row() for row in rows] == [None] * len(rows)
        assert refused.traceback


async def test_what_hangs_after_a_stop_is_left_behind_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(depth=2) as s:
        first = await s.occupy()
        rest = [s.ask([i]) for i in range(2 * 8)]
        await until(lambda: s.held == [3])
        assert await s.engine.stop(0) is False
        await asyncio.gather(first, *rest, return_exceptions=True)
        monkeypatch.setattr("carpool.engine.core._HUNG_AFTER_S", 0.02)
        s.runner.slow = 0.1
        s.open()  # the first lands, and the one behind it is given its time
        await until(lambda: s.held == [1])
        assert s.engine.state == "stopped"
        assert not core(s.engine)._dead.is_set()


async def test_work_still_in_the_tokenizer_when_draining_starts_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with scene() as s:
        inside, go_on = threading.Event(), threading.Event()
        prepare = s.built.tokenizer.prepare

        def slow(*args: Any) -> Prepared:
            inside.set()
            assert go_on.wait(10)
            return prepare(*args)

        monkeypatch.setattr(s.built.tokenizer, "prepare", slow)
        task = asyncio.ensure_future(s.engine.pool(["a " * 20] * 200, PoolingParams(), TOKENIZATION))
        await until(inside.is_set)
        s.engine.drain()
        go_on.set()
        assert len((await task).rows) == 200


async def test_nothing_comes_in_behind_the_last_answer() -> None:
    async with scene() as s:
        first = await s.occupy()
        stop = asyncio.ensure_future(s.engine.stop(5))

        async def ask_at_once() -> None:
            await first
            await s.ask([3])  # in the very turn of the loop in which the last was answered

        late = asyncio.ensure_future(ask_at_once())
        await until(lambda: s.engine.state == "draining")
        s.open()
        assert await stop is True
        async with asyncio.timeout(5):
            await asyncio.gather(late, return_exceptions=True)
        assert_nothing_left(s.engine)


async def test_stopping_while_it_loads_leaves_no_threads() -> None:
    loading = threading.Event()
    built = BuiltStandIn()

    def slow_build(_: EngineConfig) -> BuiltStandIn:
        assert loading.wait(10)
        return built

    engine = AsyncEngine(EngineConfig(), build=slow_build)
    start = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    await engine.stop(1)
    loading.set()
    await asyncio.wait_for(start, 5)
    assert engine.state == "stopped"
    assert core(engine)._fleet is None


@pytest.mark.parametrize("timeout", [0.0, 5.0])
async def test_stopping_during_warm_up_ends_it(timeout: float) -> None:
    """Whether its first batch is finished in time or not."""
    built = BuiltStandIn()
    built.runners[0].gate.clear()
    engine = AsyncEngine(EngineConfig(), build=lambda _: built)
    start = asyncio.ensure_future(engine.start())
    await until(built.runners[0].running.is_set)
    stop = asyncio.ensure_future(engine.stop(timeout))
    await until(lambda: engine.state == "draining")
    if timeout:
        built.runners[0].gate.set()
    assert await stop is (timeout > 0)
    built.runners[0].gate.set()
    await asyncio.wait_for(start, 5)
    assert engine.state == "stopped"
    assert_nothing_left(engine)


def test_a_worker_that_outlives_its_loop_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch under way at the end of a timed-out stop is left behind; its thread must not die screaming."""
    screams: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", screams.append)
    built = BuiltStandIn()

    async def story() -> AsyncEngine:
        engine = AsyncEngine(EngineConfig(), build=lambda _: built)
        await engine.start()
        built.runners[0].gate.clear()
        task = asyncio.ensure_future(engine.pool([[1]], PoolingParams(), TOKENIZATION))
        await until(built.runners[0].running.is_set)
        assert await engine.stop(0) is False
        with pytest.raises(Draining):
            await task
        return engine

    engine = asyncio.run(story())
    built.runners[0].gate.set()
    fleet = core(engine)._fleet
    assert fleet is not None
    for worker in fleet.workers:
        worker._thread.join(5)
        assert not worker.is_alive()
    assert screams == []


# ── tokens and text ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("default", "adapter", "slot"), [(None, None, 0), (None, "b", 2), ("a", None, 1), ("a", "b", 2)]
)
async def test_each_prompt_rides_on_the_adapter_asked_for(
    default: str | None, adapter: str | None, slot: int
) -> None:
    async with scene(model=replace(MODEL, adapters={"a": 1, "b": 2}, default_adapter=default)) as s:
        s.runner.adapters.clear()  # of the warm-up
        await s.ask([5], [6], adapter=adapter)
        await s.engine.score(["a"], ["b"], PoolingParams(), TOKENIZATION, Terms(adapter=adapter))
        assert s.runner.adapters == [slot] * 4


async def test_an_unknown_adapter_is_refused() -> None:
    async with scene(model=replace(MODEL, adapters={"a": 1, "b": 2})) as s:
        with pytest.raises(UnknownAdapter, match="There is no adapter 'c': loaded are a, b"):
            await s.ask([5], adapter="c")
        assert_nothing_left(s.engine)
    async with scene() as s:
        with pytest.raises(UnknownAdapter, match="none are loaded"):
            await s.ask([5], adapter="c")


async def test_tokenize_and_detokenize_are_each_others_inverse() -> None:
    async with scene() as s:
        (ids,) = await s.engine.tokenize(["the cat sat"], TokenizationParams(add_special_tokens=False))
        assert s.engine.tokens(ids) == ["the", "cat", "sat"]
        assert await s.engine.detokenize(ids) == "the cat sat"


# ── what changes while it runs ───────────────────────────────────────────────────────────────────────────────


class Hooks:
    """A rack that keeps a ledger of what is hung on it."""

    def __init__(self) -> None:
        self.hung: dict[int, tuple[str, str]] = {}

    def hang(self, slot: int, name: str, path: str) -> None:
        if path == "broken":
            raise ConfigError(f"The adapter {name!r} cannot be served: it is broken.")
        self.hung[slot] = name, path

    def drop(self, slot: int) -> None:
        del self.hung[slot]


@asynccontextmanager
async def changing(**options: Any) -> AsyncIterator[tuple[Scene, Hooks]]:
    hooks = Hooks()
    async with scene(**options, rack=hooks) as s:
        s.runner.adapters.clear()
        yield s, hooks


async def test_adapters_come_and_go() -> None:
    async with changing(model=replace(MODEL, adapters={"own": 1})) as (s, hooks):
        await s.engine.change(LoadAdapter("a", "/a"))
        await s.engine.change(LoadAdapter("b", "/b"))
        assert (hooks.hung, s.engine.model.lora_modules) == (
            {2: ("a", "/a"), 3: ("b", "/b")},
            {"a": "/a", "b": "/b"},
        )
        await s.ask([5], adapter="b")
        await s.engine.change(UnloadAdapter("a"))
        await until(lambda: set(hooks.hung) == {3})
        with pytest.raises(UnknownAdapter, match="There is no adapter 'a': loaded are own, b"):
            await s.ask([5], adapter="a")
        await s.ask([6], adapter="b")
        assert s.runner.adapters == [3, 3]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (LoadAdapter("a", "/other"), InvalidParameter, "'a' has already been loaded.*'load_inplace' to True"),
        (LoadAdapter("a", "/other", once=True), InvalidParameter, "'a' has already been loaded"),
        (LoadAdapter("own", "/own", replace=True), InvalidParameter, "A task of this model is called 'own'"),
        (LoadAdapter("b", "broken"), InvalidParameter, "'b' cannot be served: it is broken"),
        (LoadAdapter("", "/b"), InvalidParameter, "An adapter needs a name"),
        (UnloadAdapter("own"), UnknownAdapter, "'own' cannot be found"),
        (UnloadAdapter("b"), UnknownAdapter, "'b' cannot be found"),
    ],
)
async def test_a_change_that_cannot_be_leaves_all_as_it_was(
    change: Change, error: type[Exception], words: str
) -> None:
    async with changing(model=replace(MODEL, adapters={"own": 1})) as (s, hooks):
        await s.engine.change(LoadAdapter("a", "/a"))
        before = s.engine.model
        with pytest.raises(error, match=words):
            await s.engine.change(change)
        assert (s.engine.model, hooks.hung) == (before, {2: ("a", "/a")})
        await s.engine.change(LoadAdapter("a", "/a", once=True))
        assert hooks.hung == {2: ("a", "/a")}


@pytest.mark.parametrize(("path", "loaded"), [("/a", {"a": 1}), ("broken", {})])
async def test_a_change_is_made_to_its_end_when_who_asked_has_gone(
    path: str, loaded: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes of it is no complaint of the loop's that nobody heard of it."""
    begun, go = threading.Event(), threading.Event()
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    async with changing() as (s, hooks):
        hang = hooks.hang

        def slow(*args: Any) -> None:
            begun.set()
            assert go.wait(20)
            hang(*args)

        monkeypatch.setattr(hooks, "hang", slow)
        asked = asyncio.ensure_future(s.engine.change(LoadAdapter("a", path)))
        await until(begun.is_set)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        go.set()
        await s.engine.change(ResetCaches())  # it comes behind
        assert s.engine.model.adapters == loaded
    gc.collect()
    assert not complaints


async def test_weights_go_without_the_loop_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through the layers of all workers takes it longer than a request does."""
    async with changing() as (s, hooks):
        where: list[threading.Thread] = []
        drop = hooks.drop

        def noted(slot: int) -> None:
            where.append(threading.current_thread())
            drop(slot)

        monkeypatch.setattr(hooks, "drop", noted)
        await s.engine.change(LoadAdapter("a", "/a"))
        await s.engine.change(UnloadAdapter("a"))
        await until(lambda: not hooks.hung)
        assert where[0] is not threading.current_thread()


async def test_without_room_for_them_adapters_stay_as_they_are() -> None:
    async with scene() as s:
        for change in (LoadAdapter("a", "/a"), UnloadAdapter("a")):
            with pytest.raises(InvalidParameter, match="started with --allow-runtime-lora-updating"):
                await s.engine.change(change)


@pytest.mark.parametrize("change", [UnloadAdapter("a"), LoadAdapter("a", "/new", replace=True)])
async def test_who_has_asked_for_an_adapter_still_rides_on_it(change: Change) -> None:
    """Its weights stay until the last of them is answered, and nobody else gets on."""
    async with changing() as (s, hooks):
        await s.engine.change(LoadAdapter("a", "/a"))
        busy = await s.occupy()
        waiting = s.ask([5, 6], adapter="a")
        await until(lambda: s.engine.waiting_sequences)
        await s.engine.change(change)
        await asyncio.sleep(0.05)
        assert 1 in hooks.hung
        s.open()
        assert (await waiting).rows[0].tolist() == [2, 11]
        await busy
        assert s.runner.adapters == [0, 1]
        await until(lambda: 1 not in hooks.hung)


async def test_an_adapter_stays_while_a_batch_runs_whose_client_has_left() -> None:
    async with changing() as (s, hooks):
        await s.engine.change(LoadAdapter("a", "/a"))
        s.runner.gate.clear()
        left = s.ask([5], adapter="a")
        await until(s.runner.running.is_set)
        left.cancel()
        await s.engine.change(UnloadAdapter("a"))
        await asyncio.sleep(0.05)
        assert 1 in hooks.hung
        s.open()
        await until(lambda: not hooks.hung)


async def test_who_comes_for_an_adapter_that_has_gone_meanwhile_is_told() -> None:
    """A request that was made ready elsewhere while the last of its adapter went."""
    async with changing() as (s, hooks):
        await s.engine.change(LoadAdapter("a", "/a"))
        await s.engine.change(UnloadAdapter("a"))
        await until(lambda: not hooks.hung)
        late = Request(PoolingParams(), ("embed",), adapter=1)
        with pytest.raises(UnknownAdapter, match="was unloaded while this request was on its way"):
            await s.engine.core.run(late, Prepared([[5]]), None)
        assert_nothing_left(s.engine)


async def test_who_comes_for_one_that_was_exchanged_meanwhile_rides_on_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: the whole exchange happens while the prompts are on their way from the tokenizer to the queue."""
    async with changing() as (s, hooks):
        await s.engine.change(LoadAdapter("a", "/a"))
        run = s.engine.core.run
        exchanged = False

        async def slow(*args: Any) -> PoolingResult:
            nonlocal exchanged
            if not exchanged:
                exchanged = True
                await s.engine.change(LoadAdapter("a", "/b", replace=True))
                await until(lambda: set(hooks.hung) == {2})
            return await run(*args)

        monkeypatch.setattr(s.engine.core, "run", slow)
        assert (await s.ask([5, 6], adapter="a")).rows[0].tolist() == [2, 11]
        assert s.runner.adapters == [2]


async def test_results_of_one_adapter_are_never_anothers_of_its_name() -> None:
    async with changing(config=EngineConfig(cache_size=1 << 20)) as (s, _):
        for path in ("/one", "/two"):
            await s.engine.change(LoadAdapter("a", path, replace=True))
            for _ in range(2):
                await s.ask([5], adapter="a")
        await s.engine.change(UnloadAdapter("a"))
        await s.engine.change(LoadAdapter("a", "/one"))
        await s.ask([5], adapter="a")
        assert s.runner.adapters == [1, 2, 3]


async def test_after_a_reset_nothing_is_used_again() -> None:
    cache = Cache(Paging(BlockPool(40, 4), 16), frozenset[Task]({"embed"}), finds_prefixes=True)
    async with scene(config=EngineConfig(cache_size=1 << 20), cache=cache) as s:
        prompt = list(range(1, 10))
        for _ in range(2):
            await s.ask(prompt)
        assert len(s.runner.batches) == 1
        assert (await s.ask([*prompt, 3])).cached == [8]
        await s.engine.change(ResetCaches())
        assert (await s.ask([*prompt, 4])).cached == [0]
        assert (await s.ask([*prompt, 5])).cached == [8]
        await s.ask(prompt)
        assert len(s.runner.batches) == 5


# ── with a real model ────────────────────────────────────────────────────────────────────────────────────────


async def test_workers_side_by_side_and_batches_in_a_row_give_one_workers_results(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more than 1,000 batches of mixed lengths, tasks and widths."""
    rng = random.Random(5)
    requests = [
        [
            [rng.randrange(113) for _ in range(rng.choice([1, 2, 5, 9, 9, 20, 32]))]
            for _ in range(rng.randint(1, 6))
        ]
        for _ in range(1000)
    ]
    config = EngineConfig(
        model=str(checkpoint("bert")), max_model_len=32, max_num_batched_tokens=32, dtype="float32",
        max_queued_tokens=1_000_000,
        hf_overrides={"num_hidden_layers": 1},
    )  # fmt: skip
    results = []
    for workers, depth in ((1, 1), (2, 1), (1, 2)):
        monkeypatch.setattr(staging.Host, "depth", depth)
        ledger = Ledger()
        engine = AsyncEngine(replace(config, cpu_workers=workers), build=build)
        engine.observer = ledger
        await engine.start()
        tasks: list[asyncio.Future[PoolingResult]] = []
        for i, prompts in enumerate(requests):
            task: Task = "token_embed" if i % 10 == 0 else "embed"
            tasks.append(
                asyncio.ensure_future(
                    engine.pool(prompts, PoolingParams(use_activation=i % 3 > 0), TOKENIZATION, task=task)
                )
            )
        results.append(await asyncio.gather(*tasks))
        assert ledger.batches > 1000
        assert await engine.stop(5)
    one, *others = results
    for other in others:
        for expected, result in zip(one, other, strict=True):
            for a, b in zip(expected.rows, result.rows, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(np.abs(a).max()))
