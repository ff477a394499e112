"""Twins in the scheduler: of sequences of one key one is run, and nobody pays for the company."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from carpool.engine.batch import Batch
from carpool.engine.cache.blocks import BlockPool, Prompt
from carpool.engine.cache.hashing import block_hashes
from carpool.engine.cache.paging import Paging
from carpool.engine.params import PoolingParams
from carpool.engine.scheduler import Scheduler
from carpool.engine.sequence import Sequence

PARAMS = PoolingParams()
SIZE, CHUNK = 4, 16
LENGTHS = (3, 10, 30, 60)  # of text 0, 1, …: the last two are run in chunks
_requests = count()


def sequence(text: int, request: int | None = None, index: int = 0, **options: object) -> Sequence:
    ids = [text] * LENGTHS[text]
    number = next(_requests) if request is None else request
    prompt = Prompt(len(ids), block_hashes(ids, SIZE))
    return Sequence(number, index, ids, PARAMS, key=b"%d" % text, prompt=prompt, **options)  # type: ignore[arg-type]


def scheduler_of(blocks: int = 40) -> Scheduler:
    return Scheduler(40, 5, paging=Paging(BlockPool(blocks, SIZE), CHUNK), min_share_tokens=8)


def added(scheduler: Scheduler, *sequences: Sequence) -> None:
    for seq in sequences:
        scheduler.add(seq)


def deal(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule(0.0)
    assert batch is not None
    return batch


def assert_idle(scheduler: Scheduler) -> None:
    assert (scheduler.waiting_tokens, scheduler.waiting_sequences) == (0, 0)
    assert scheduler.schedule(0.0) is None
    assert (scheduler._queue._requests, scheduler._queue._clients, scheduler._begun) == ({}, {}, {})
    twins = scheduler._twins
    assert (twins._waiting, twins._rides, twins._resting) == ({}, {}, {})


# ── any history ──────────────────────────────────────────────────────────────────────────────────────────────


class AnyHistory(RuleBasedStateMachine):
    """Each sequence ends once: with a result of its key, with its request, or at its deadline."""

    @initialize(blocks=st.integers(16, 40))
    def begins(self, blocks: int) -> None:
        self.scheduler = scheduler_of(blocks)
        self.live: dict[Sequence, bytes] = {}
        self.flying: list[Batch] = []
        self.now = 0.0

    @rule(
        texts=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        client=st.sampled_from("ab"),
        priority=st.sampled_from([0, 0, -1, 1]),
        patience=st.none() | st.floats(0, 5),
    )
    def arrives(self, texts: list[int], client: str, priority: int, patience: float | None) -> None:
        request, deadline = next(_requests), None if patience is None else self.now + patience
        for i, text in enumerate(texts):
            seq = sequence(text, request, i, client=client, priority=priority, deadline=deadline)
            self.live[seq] = seq.key
            self.scheduler.add(seq)

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(sorted({seq.request_id for seq in self.live}))))

    def _end(self, request: int) -> None:
        own = [seq for seq in self.live if seq.request_id == request]
        under_way = {seq for batch in self.flying for seq in batch.sequences}
        assert self.scheduler.abort(request) == len([seq for seq in own if seq not in under_way])
        for seq in own:
            del self.live[seq]

    @precondition(lambda self: len(self.flying) < 3)
    @rule(idle=st.integers(1, 3))
    def deals(self, idle: int) -> None:
        batch = self.scheduler.schedule(self.now, idle)
        if batch is not None:
            assert all(seq in self.live for seq in batch.sequences), "nobody waits for it"
            self.flying.append(batch)
        expired = self.scheduler.take_expired()
        for seq in expired:
            assert seq.deadline is not None
            assert seq.deadline <= self.now
            del self.live[seq]
        for request in {seq.request_id for seq in expired}:
            self._end(request)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), how=st.sampled_from(["well", "well", "well", "failed", "undone"]))
    def lands(self, data: st.DataObject, how: str) -> None:
        batch = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        gone = {seq for seq in batch.sequences if seq not in self.live}
        if how == "undone":
            self.scheduler.undone(batch, gone)
            return
        failed = set(batch.sequences[:1]) if how == "failed" else set()
        done = [
            seq
            for seq, tokens in zip(batch.sequences, batch.counts, strict=True)
            if tokens == seq.remaining or seq in failed
        ]
        self.scheduler.landed(batch, gone, failed)
        for seq in done:
            key = self.live.pop(seq, seq.key)
            for twin in self.scheduler.take_twins(seq):
                assert self.live.pop(twin) == key
            assert self.scheduler.take_twins(seq) == []

    @invariant()
    def no_two_of_one_key_are_under_way(self) -> None:
        if hasattr(self, "flying"):
            keys = [seq.key for batch in self.flying for seq in batch.sequences if seq.key]
            assert len(keys) == len(set(keys))

    def teardown(self) -> None:
        if not hasattr(self, "flying"):
            return
        self.now = -1.0  # nothing expires any more
        for _ in range(2000):
            while len(self.flying) < 2 and (batch := self.scheduler.schedule(self.now)) is not None:
                self.flying.append(batch)
            if not self.flying:
                break
            batch = self.flying.pop(0)
            done = [s for s, n in zip(batch.sequences, batch.counts, strict=True) if n == s.remaining]
            self.scheduler.landed(batch, {seq for seq in batch.sequences if seq not in self.live})
            for seq in done:
                for each in (seq, *self.scheduler.take_twins(seq)):
                    self.live.pop(each, None)
        assert not self.live, "somebody is forgotten"
        assert_idle(self.scheduler)


AnyHistory.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase


# ── who goes first, and who pays ─────────────────────────────────────────────────────────────────────────────


def test_one_is_dealt_and_the_others_rest_and_none_else_is_held_up() -> None:
    scheduler = scheduler_of()
    twins, other = [sequence(0) for _ in range(4)], sequence(1)
    added(scheduler, *twins, other)
    batch = deal(scheduler)
    assert set(batch.sequences) == {twins[0], other}
    late = sequence(0)
    added(scheduler, late)
    assert scheduler.waiting_sequences == 0
    scheduler.landed(batch)
    assert scheduler.take_twins(other) == []
    assert scheduler.take_twins(twins[0]) == [*twins[1:], late]
    assert_idle(scheduler)


def test_the_higher_priority_is_dealt_and_the_lower_is_given_its_result() -> None:
    scheduler = scheduler_of()
    low, between, high = sequence(0, priority=5), sequence(1, priority=3), sequence(0, priority=0)
    added(scheduler, low, between, high)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert high in batch.sequences
    assert low not in batch.sequences
    assert scheduler.take_twins(high) == [low]


def test_a_light_client_does_not_stand_in_a_heavy_ones_queue_for_the_sake_of_a_twin() -> None:
    scheduler = Scheduler(10, 5)
    heavy = next(_requests)
    for i in range(50):
        scheduler.add(Sequence(heavy, i, [i] * 10, PARAMS, key=b"own %d" % i, client="heavy"))
    first = deal(scheduler)
    light = Sequence(next(_requests), 0, [49] * 10, PARAMS, key=b"own 49", client="light")
    scheduler.add(light)
    assert scheduler.waiting_sequences == 50
    scheduler.landed(first)
    assert any(light in deal(scheduler).sequences for _ in range(2))
    assert [twin.index for twin in scheduler.take_twins(light)] == [49]


def test_those_that_rest_are_not_charged() -> None:
    scheduler = Scheduler(10, 1)
    free = [Sequence(1, i, [0] * 10, PARAMS, key=b"x", client="twin") for i in range(1)]
    payer = Sequence(2, 0, [0] * 10, PARAMS, key=b"x", client="payer")
    later = {client: Sequence(number, 0, [number] * 10, PARAMS, client=client) for number, client in
             ((3, "payer"), (4, "twin"))}  # fmt: skip
    added(scheduler, payer, *later.values(), *free)
    assert deal(scheduler).sequences == (payer,)
    assert deal(scheduler).sequences == (later["twin"],), "it has had nothing yet"
    assert deal(scheduler).sequences == (later["payer"],)


def test_only_one_of_higher_priority_is_run_beside_a_lead_that_has_chunks_to_come() -> None:
    scheduler = scheduler_of()
    lead, equal, high = sequence(3), sequence(3), sequence(3, priority=-1)
    added(scheduler, lead)
    batch = deal(scheduler)
    assert batch.num_tokens == CHUNK
    added(scheduler, equal, high)
    assert scheduler.waiting_sequences == 1
    scheduler.landed(batch)
    assert high in deal(scheduler).sequences


def test_behind_the_last_chunk_everybody_rests() -> None:
    scheduler = scheduler_of()
    lead = sequence(0)
    added(scheduler, lead)
    deal(scheduler)
    high = sequence(0, priority=-1)
    added(scheduler, high)
    assert scheduler.waiting_sequences == 0
    assert scheduler.take_twins(lead) == [high]


# ── who leaves ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("when", ["it waits", "it runs", "between its chunks"])
@pytest.mark.parametrize("text", [0, 3])
def test_a_lead_that_leaves_does_not_take_the_work_along(when: str, text: int) -> None:
    scheduler = scheduler_of()
    lead, twin = sequence(text), sequence(text)
    added(scheduler, lead, twin)
    gone: set[Sequence] = set()
    if when != "it waits":
        batch = deal(scheduler)
        assert scheduler.waiting_sequences == 0
        if when == "it runs":
            gone.add(lead)
            scheduler.abort(lead.request_id)
        whole = batch.counts[0] == lead.remaining
        scheduler.landed(batch, gone)
        if whole:
            assert scheduler.take_twins(lead) == [twin], "it was run to its end all the same"
            return
    if not gone:
        assert scheduler.abort(lead.request_id) == 1
    assert scheduler.waiting_sequences == 1
    while twin.remaining:
        batch = deal(scheduler)
        assert batch.sequences == (twin,)
        scheduler.landed(batch)
    assert scheduler.take_twins(twin) == []
    assert_idle(scheduler)


def test_a_lead_that_expires_between_its_chunks_wakes_the_others() -> None:
    scheduler = scheduler_of()
    lead, twin = sequence(3, deadline=1.0), sequence(3)
    added(scheduler, lead)
    batch = deal(scheduler)
    added(scheduler, twin)
    scheduler.landed(batch)
    assert scheduler.schedule(2.0) is None
    assert scheduler.take_expired() == [lead]
    assert deal(scheduler).sequences == (twin,)


def test_a_twin_that_leaves_is_forgotten_and_counted() -> None:
    scheduler = scheduler_of()
    lead, leaver, stayer = (sequence(0) for _ in range(3))
    added(scheduler, lead, leaver, stayer)
    deal(scheduler)
    assert scheduler.abort(leaver.request_id) == 1
    assert scheduler.abort(leaver.request_id) == 0
    assert scheduler.take_twins(lead) == [stayer]


def test_twins_of_what_was_undone_are_tried_alone_too() -> None:
    scheduler = scheduler_of()
    lead, other, twin = sequence(0), sequence(1), sequence(0)
    added(scheduler, lead, other, twin)
    scheduler.undone(deal(scheduler))
    for _ in range(2):
        batch = deal(scheduler)
        assert len(batch.sequences) == 1
        scheduler.landed(batch)
        first = batch.sequences[0]
        assert scheduler.take_twins(first) == ([twin] if first is lead else [])
    assert_idle(scheduler)


def test_without_a_key_nobody_has_twins() -> None:
    scheduler = scheduler_of()
    added(scheduler, *(Sequence(next(_requests), 0, [1] * 3, PARAMS) for _ in range(3)))
    assert len(deal(scheduler).sequences) == 3
