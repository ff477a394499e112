"""The worker's thread: results and death are both told, each once and in order, from the thread itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carpool.engine import memory, worker
from carpool.engine.batch import Batch
from carpool.engine.errors import InferenceFailed
from carpool.engine.memory import HeapTrimmer
from carpool.engine.params import PoolingParams
from carpool.engine.sequence import Sequence
from carpool.engine.worker import Landing, Row, Worker

BATCH = Batch((Sequence(0, 0, [1, 2], PoolingParams()),))


def batches(number: int) -> list[Batch]:
    return [Batch((Sequence(i, 0, [1], PoolingParams()),)) for i in range(number)]


class Recorder:
    """A runner and the two listeners, all in one. `errors` are raised by the call of that name."""

    def __init__(self, depth: int = 1, **errors: BaseException | None) -> None:
        self.depth = depth
        self.errors = errors
        self.calls: list[tuple[str, threading.Thread]] = []
        self.told: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self.worker = Worker(self, self.done, self.died, "under-test")

    def _called(self, name: str) -> None:
        self.calls.append((name, threading.current_thread()))
        error = self.errors.get(name)
        if error:
            raise error

    def bind(self) -> None:
        self._called("bind")

    def launch(self, batch: Batch) -> Landing:
        self._called("launch")

        def land() -> list[Row]:
            self._called("land")
            return [np.zeros(1, np.float32) for _ in batch.sequences]

        return land

    def done(self, *result: Any) -> None:
        self.told.put(("done", threading.current_thread(), *result))

    def died(self, *result: Any) -> None:
        self.told.put(("died", threading.current_thread(), *result))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def test_everything_happens_in_the_workers_own_thread() -> None:
    recorder = Recorder()
    recorder.worker.start()
    recorder.worker.submit(BATCH)
    what, thread, worker, batch, rows, seconds, began = recorder.told.get(timeout=5)
    assert (what, worker, batch, len(rows)) == ("done", recorder.worker, BATCH, 1)
    assert seconds >= 0
    assert 0 <= time.monotonic() - began - seconds < 5
    assert thread.name == "under-test"
    assert {caller for _, caller in recorder.calls} == {thread}
    assert recorder.names == ["bind", "launch", "land"]
    recorder.worker.stop()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_stops_behind_the_batches_that_were_given(depth: int) -> None:
    recorder = Recorder(depth)
    for batch in batches(recorder.worker.places):
        recorder.worker.submit(batch)
    recorder.worker.stop()
    recorder.worker.start()
    recorder.worker._thread.join(5)
    assert not recorder.worker.is_alive()
    assert [recorder.told.get_nowait()[0] for _ in range(recorder.worker.places)] == [
        "done"
    ] * recorder.worker.places
    assert recorder.told.empty()


@pytest.mark.parametrize("where", ["bind", "launch", "land"])
@pytest.mark.parametrize("error", [RuntimeError("lost"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("depth", [1, 2])
def test_its_death_is_told_once_whatever_kills_it(depth: int, where: str, error: BaseException) -> None:
    recorder = Recorder(depth, **{where: error})
    for batch in batches(recorder.worker.places):
        recorder.worker.submit(batch)
    recorder.worker.start()
    what, _, worker, reason = recorder.told.get(timeout=5)
    assert (what, worker, reason) == ("died", recorder.worker, error)
    recorder.worker._thread.join(5)
    assert recorder.told.empty()


def test_a_result_that_is_not_one_a_sequence_is_its_death() -> None:
    recorder = Recorder()
    recorder.launch = lambda batch: list  # type: ignore[method-assign]
    recorder.worker.start()
    recorder.worker.submit(BATCH)
    what, _, _, error = recorder.told.get(timeout=5)
    assert (what, str(error)) == ("died", "0 results for 1 sequences")


def test_it_is_bound_to_its_cpus_for_batches_at_home_and_nobody_else_is() -> None:
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    seen: list[set[int]] = []
    recorder = Recorder()

    def launch(batch: Batch) -> Landing:
        seen.append(os.sched_getaffinity(0))
        return Recorder.launch(recorder, batch)

    recorder.launch = launch  # type: ignore[method-assign]
    recorder.worker = Worker(recorder, recorder.done, recorder.died, "under-test", (cpu,))
    recorder.worker.start()
    for at_home in (False, True, True, False, True):
        recorder.worker.submit(BATCH, at_home)
        assert recorder.told.get(timeout=5)[0] == "done"
    recorder.worker.stop()
    assert seen == [allowed, {cpu}, {cpu}, allowed, {cpu}]
    assert os.sched_getaffinity(0) == allowed


def test_it_floats_where_it_has_no_home() -> None:
    recorder = Recorder()
    recorder.worker.start()
    recorder.worker.submit(BATCH, at_home=True)
    assert recorder.told.get(timeout=5)[0] == "done"
    native = recorder.worker._thread.native_id
    assert native is not None
    assert os.sched_getaffinity(native) == os.sched_getaffinity(0)
    recorder.worker.stop()


def test_it_floats_and_says_so_once_where_its_cpus_are_gone(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    recorder.worker = Worker(recorder, recorder.done, recorder.died, "under-test", (1000,))
    recorder.worker.start()
    for _ in range(2):
        recorder.worker.submit(BATCH, at_home=True)
        assert recorder.told.get(timeout=5)[0] == "done"
    assert caplog.text.count("under-test is not bound to CPUs [1000]") == 1
    recorder.worker.stop()


def test_its_thread_does_not_keep_the_process_alive() -> None:
    assert Recorder().worker._thread.daemon


# ── several under way ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("depth", "order"),
    [
        (1, "launch land launch land launch land launch land"),
        (2, "launch launch land launch land launch land land"),
        (3, "launch launch launch land launch land land land"),
    ],
)
def test_there_is_always_one_more_under_way_while_one_is_waited_for(depth: int, order: str) -> None:
    recorder = Recorder(depth)
    for batch in batches(4):
        recorder.worker.submit(batch)
    recorder.worker.stop()
    recorder.worker.start()
    recorder.worker._thread.join(5)
    assert recorder.names[1:] == order.split()


@pytest.mark.parametrize(("depth", "places"), [(1, 1), (2, 3), (3, 4)])
def test_only_a_deep_worker_has_one_at_the_door(depth: int, places: int) -> None:
    assert Recorder(depth).worker.places == places


def test_a_batch_with_nothing_behind_it_is_not_kept_waiting() -> None:
    recorder = Recorder(depth=3)
    recorder.worker.start()
    for batch in batches(3):
        recorder.worker.submit(batch)
        assert recorder.told.get(timeout=5)[3] is batch
    recorder.worker.stop()


def test_seconds_are_those_that_a_batch_had_the_device() -> None:
    """So that they add up to the time that the device was busy, and not to a multiple of it."""
    recorder = Recorder(depth=2)
    pause = 0.05
    recorder.launch = lambda batch: lambda: time.sleep(pause) or [np.zeros(1, np.float32)]  # type: ignore[method-assign, func-returns-value]
    for batch in batches(4):
        recorder.worker.submit(batch)
    recorder.worker.stop()
    before = time.perf_counter()
    recorder.worker.start()
    recorder.worker._thread.join(5)
    spent = time.perf_counter() - before
    seconds = [recorder.told.get_nowait()[5] for _ in range(4)]
    assert min(seconds) >= 0.9 * pause
    assert sum(seconds) <= spent


class Device:
    """A runner whose batches take the time they are told, fail as they are told, and kill as they are told."""

    def __init__(self, depth: int, fates: list[tuple[str, float]]) -> None:
        self.depth = depth
        self.fates = iter(fates)
        self.under_way = 0
        self.most = 0
        self.numbers = count()
        self.next_to_land = 0

    def bind(self) -> None:
        pass

    def launch(self, batch: Batch) -> Landing:
        fate, seconds = next(self.fates)
        if fate == "dies at launch":
            raise SystemExit(fate)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        number = next(self.numbers)

        def land() -> list[Row]:
            assert number == self.next_to_land, "landings are called in the order of launches"
            self.next_to_land += 1
            time.sleep(seconds)
            self.under_way -= 1
            if fate == "dies at landing":
                raise RuntimeError(fate)
            row: Row = InferenceFailed(fate) if fate == "fails" else np.array([number], np.float32)
            return [row] * len(batch.sequences)

        return land


FATES = st.sampled_from(["lands"] * 6 + ["fails"] * 2 + ["dies at launch", "dies at landing"])
PAUSES = st.sampled_from([0.0, 0.0, 0.0002, 0.001])


@settings(max_examples=100, deadline=None)
@given(
    depth=st.integers(1, 3),
    stories=st.lists(st.tuples(FATES, PAUSES, PAUSES), min_size=1, max_size=15),
)
def test_each_batch_has_one_result_in_order_whatever_comes_when(
    depth: int, stories: list[tuple[str, float, float]]
) -> None:
    """Up to the death of the thread, which is told once and last."""
    device = Device(depth, [(fate, landing) for fate, _, landing in stories])
    told: list[tuple[Batch | None, object]] = []
    free = threading.Semaphore(0)  # places
    over = threading.Event()

    def died(_: Worker, error: BaseException) -> None:
        told.append((None, error))
        over.set()
        free.release(len(stories))

    def done(_: Worker, batch: Batch, rows: list[Row], seconds: float, _began: float) -> None:
        assert seconds >= 0
        told.append((batch, rows[0]))
        free.release()

    worker = Worker(device, done, died, "under-test")
    free.release(worker.places)
    worker.start()
    given_batches = batches(len(stories))
    for batch, (_, pause, _) in zip(given_batches, stories, strict=True):
        assert free.acquire(timeout=5)
        time.sleep(pause)
        worker.submit(batch)
    worker.stop()
    worker._thread.join(5)
    assert not worker.is_alive()
    assert device.most <= depth

    fates = [fate for fate, _, _ in stories]
    deaths = [i for i, fate in enumerate(fates) if fate.startswith("dies")]
    answered = [batch for batch, _ in told if batch is not None]
    assert answered == given_batches[: len(answered)], "in order, none twice, none left out"
    for fate, (_, result) in zip(fates, told, strict=False):
        if not isinstance(result, BaseException):
            assert fate == "lands"
    if not deaths:
        assert len(answered) == len(stories)
        assert not over.is_set()
    else:
        # One that dies at launch takes those along that are still under way before it.
        assert deaths[0] - depth < len(answered) <= deaths[0]
        assert [batch for batch, _ in told].count(None) == 1
        assert told[-1][0] is None


def test_what_lies_in_the_inbox_is_launched_before_the_next_one_is_waited_for() -> None:
    """With a batch at the door the device has its next one before the last has landed, however late the owner hears."""
    gates = [threading.Event() for _ in range(3)]
    launched: SimpleQueue[int] = SimpleQueue()
    numbers = count()

    class Gated(Recorder):
        def launch(self, batch: Batch) -> Callable[[], list[Row]]:
            number = next(numbers)
            launched.put(number)

            def land() -> list[Row]:
                assert gates[number].wait(5)
                return [np.zeros(1, np.float32)]

            return land

    recorder = Gated(depth=2)
    for batch in batches(3):
        recorder.worker.submit(batch)
    recorder.worker.start()
    assert [launched.get(timeout=5) for _ in range(2)] == [0, 1]
    assert launched.empty()
    gates[0].set()
    assert launched.get(timeout=5) == 2, "while the second has not landed"
    for gate in gates:
        gate.set()
    recorder.worker.stop()
    recorder.worker._thread.join(5)


def test_one_trims_the_heap_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through what every thread left: by each of many workers it would be done as many times too often."""
    trims: list[int] = []
    monkeypatch.setattr(memory, "_EVERY_S", 1e9)
    monkeypatch.setattr(worker, "heap", HeapTrimmer(trims.append))
    for _ in range(3):
        recorder = Recorder()
        recorder.worker.start()
        for batch in batches(4):
            recorder.worker.submit(batch)
            recorder.told.get(timeout=5)
        recorder.worker.stop()
        recorder.worker._thread.join(5)
    assert trims == [0]
