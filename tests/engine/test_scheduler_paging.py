"""The scheduler with a cache: prompts in chunks, shared prefixes, tiny caches, failures, in any order."""

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
SIZE = 4  # tokens of a block
_requests = count()


def sequence(
    token_ids: list[int], *, reuse: bool = True, request: int | None = None, client: str = ""
) -> Sequence:
    prompt = Prompt(len(token_ids), block_hashes(token_ids, SIZE) if reuse else (), reuse)
    number = next(_requests) if request is None else request
    return Sequence(number, 0, token_ids, PARAMS, prompt=prompt, client=client)


def scheduler_of(blocks: int, *, tokens: int = 40, chunk: int = 16, seqs: int = 6) -> Scheduler:
    return Scheduler(tokens, seqs, paging=Paging(BlockPool(blocks, SIZE), chunk), min_share_tokens=8)


def run(scheduler: Scheduler, rounds: int = 1000) -> list[Batch]:
    """Deal and land until nothing waits."""
    batches: list[Batch] = []
    for _ in range(rounds):
        batch = scheduler.schedule(0.0)
        if batch is None:
            assert not scheduler.waiting_sequences
            return batches
        batches.append(batch)
        scheduler.landed(batch)
    raise AssertionError("it never ends")


class AnyHistory(RuleBasedStateMachine):
    """Beside the scheduler runs what the layers would do: a memory of the tokens whose keys lie in each slot."""

    MAX_TOKENS, CHUNK, MAX_SEQS = 40, 16, 5

    @initialize(blocks=st.integers(6, 30))
    def begins(self, blocks: int) -> None:
        self.pool = BlockPool(blocks, SIZE)
        self.scheduler = Scheduler(
            self.MAX_TOKENS, self.MAX_SEQS, paging=Paging(self.pool, self.CHUNK), min_share_tokens=8
        )
        self.slots: dict[int, tuple[int, ...]] = {}  # the prefix up to the token whose keys lie there
        self.waiting: dict[Sequence, int] = {}  # and how many of its tokens have been run, or found
        self.flying: list[Batch] = []
        self.gone: set[int] = set()
        self.now = 0.0

    @rule(
        beginnings=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        length=st.integers(1, 60),
        own=st.integers(0, 12),
        reuse=st.sampled_from([True, True, True, False]),
        client=st.sampled_from("ab"),
        patience=st.none() | st.floats(0, 5),
    )
    def arrives(
        self, beginnings: list[int], length: int, own: int, reuse: bool, client: str, patience: float | None
    ) -> None:
        request = next(_requests)
        for place, beginning in enumerate(beginnings):
            ids = [beginning] * length + [10 + place] * own
            seq = sequence(ids, reuse=reuse, request=request, client=client)
            seq.deadline = None if patience is None else self.now + patience
            if self.scheduler.fits(seq):
                self.scheduler.add(seq)
                self.waiting[seq] = 0
            else:
                assert len(ids) > max(self.MAX_TOKENS, self.pool.num_blocks * SIZE)
                with pytest.raises(ValueError, match="do not fit"):
                    self.scheduler.add(seq)

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([seq.request_id for seq in self.waiting]))
        self.scheduler.abort(request)
        self.gone.add(request)
        self.waiting = {seq: done for seq, done in self.waiting.items() if seq.request_id != request}

    @precondition(lambda self: len(self.flying) < 3)
    @rule(idle=st.integers(1, 3))
    def deals(self, idle: int) -> None:
        waiting = self.scheduler.waiting_sequences
        batch = self.scheduler.schedule(self.now, idle)
        for seq in self.scheduler.take_expired():
            assert seq.deadline is not None
            assert seq.deadline <= self.now
            assert seq.table is None
            self.waiting.pop(seq, None)
        if batch is None:
            still = self.scheduler.waiting_sequences
            assert not still or self.flying, "something waits, and nothing that runs will make room for it"
            return
        assert waiting
        self._check(batch)
        self.flying.append(batch)

    def _check(self, batch: Batch) -> None:
        assert len(batch.sequences) <= self.MAX_SEQS
        assert batch.num_tokens <= self.MAX_TOKENS
        aboard = [seq for other in self.flying for seq in other.sequences]
        if any(seq.alone for seq in batch.sequences):
            assert len(batch.sequences) == 1
        for seq, tokens in zip(batch.sequences, batch.counts, strict=True):
            assert seq not in aboard, "a sequence rides in one batch at a time"
            assert seq.computed >= self.waiting[seq]
            assert 0 < tokens <= seq.remaining
            if tokens < seq.remaining or self.waiting[seq]:
                assert batch.num_tokens <= self.CHUNK
        # Every layer writes the keys of the whole batch, then reads.
        written: dict[int, tuple[int, ...]] = {}
        for seq, tokens in zip(batch.sequences, batch.counts, strict=True):
            if seq.table is not None:
                end = seq.computed + tokens
                for place, slot in enumerate(self.pool.slots(seq.table, seq.computed, end), seq.computed + 1):
                    assert slot not in written, "two write to one place"
                    written[slot] = tuple(seq.token_ids[:place])
            else:
                assert tokens == seq.num_tokens
        for seq in batch.sequences:
            if seq.table is not None:
                for place, slot in enumerate(self.pool.slots(seq.table, 0, seq.computed), 1):
                    read = written.get(slot, self.slots.get(slot))
                    assert read == tuple(seq.token_ids[:place]), "keys of another text"
        for other in self.flying:
            for seq, tokens in zip(other.sequences, other.counts, strict=True):
                if seq.table is not None:
                    assert not written.keys() & set(self.pool.slots(seq.table, 0, seq.computed + tokens))
        self.slots.update(written)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def lands(self, data: st.DataObject, fails: bool) -> None:
        batch = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        gone = {seq for seq in batch.sequences if seq.request_id in self.gone}
        if fails and len(batch.sequences) > 1:
            for seq in batch.sequences:
                if seq.table is not None:  # who knows what it wrote
                    for slot in self.pool.slots(seq.table, seq.computed, seq.table.upto):
                        self.slots[slot] = (-1,)
                if seq in self.waiting:
                    self.waiting[seq] = 0
            self.scheduler.undone(batch, gone)
            return
        for seq, tokens in zip(batch.sequences, batch.counts, strict=True):
            if seq in gone:
                continue
            if seq.computed + tokens == seq.num_tokens:
                del self.waiting[seq]
            else:
                self.waiting[seq] = seq.computed + tokens
        self.scheduler.landed(batch, gone)

    @invariant()
    def what_waits_is_counted(self) -> None:
        aboard = {seq for batch in self.flying for seq in batch.sequences}
        idle = [seq for seq in self.waiting if seq not in aboard]
        assert self.scheduler.waiting_sequences == len(idle)
        assert self.scheduler.waiting_tokens == sum(seq.remaining for seq in idle)

    def teardown(self) -> None:
        """Whatever came before, all of it is served in the end, and nothing is held."""
        if not hasattr(self, "pool"):
            return
        self.now = -1e9  # no deadline passes any more
        for _ in range(10_000):
            while self.flying:
                batch = self.flying.pop()
                gone = {seq for seq in batch.sequences if seq.request_id in self.gone}
                for seq, tokens in zip(batch.sequences, batch.counts, strict=True):
                    if seq not in gone and seq.computed + tokens == seq.num_tokens:
                        del self.waiting[seq]
                    elif seq in self.waiting:
                        self.waiting[seq] = seq.computed + tokens
                self.scheduler.landed(batch, gone)
            next_batch = self.scheduler.schedule(self.now)
            if next_batch is None:
                break
            self._check(next_batch)
            self.flying.append(next_batch)
        assert not self.waiting
        assert not self.scheduler.waiting_sequences
        assert self.pool.num_used == 0
        assert self.pool.num_available == self.pool.num_blocks


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ── what it is for ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_prompt_advances_beside_short_ones() -> None:
    scheduler = scheduler_of(30, chunk=16)
    long = sequence(list(range(100)), client="long")
    scheduler.add(long)
    first = scheduler.schedule(0.0)
    assert first is not None
    assert first.counts == (16,)
    shorts = [sequence([1000 + i] * 3, client="short") for i in range(2)]
    for seq in shorts:
        scheduler.add(seq)
    scheduler.landed(first)
    second = scheduler.schedule(0.0)
    assert second is not None
    assert set(second.sequences) == {long, *shorts}
    assert second.num_tokens == 16, "no longer than a chunk takes, whoever rides in it"
    scheduler.landed(second)
    rest = run(scheduler)
    assert sum(batch.num_tokens for batch in rest) == 100 - 16 - 10


def test_documents_that_share_a_query_run_it_once() -> None:
    scheduler = scheduler_of(60, tokens=64, chunk=64)
    shared = list(range(24))
    documents = [sequence([*shared, 100 + i], request=-1) for i in range(5)]
    for seq in documents:
        scheduler.add(seq)
    [batch] = run(scheduler)
    assert batch.num_tokens == 25 + 4
    assert sorted(seq.cached for seq in documents) == [0, 24, 24, 24, 24]
    again = sequence([*shared, 999])
    scheduler.add(again)
    [batch] = run(scheduler)
    assert batch.counts == (1,)


def test_what_wants_every_token_finds_nothing_and_shares_nothing() -> None:
    scheduler = scheduler_of(60, tokens=64, chunk=64)
    for _ in range(2):
        scheduler.add(sequence(list(range(24)), reuse=False))
    assert sum(batch.num_tokens for batch in run(scheduler)) == 48


def test_a_full_cache_makes_only_long_prompts_wait() -> None:
    scheduler = scheduler_of(8, chunk=16)
    scheduler.add(sequence([1] * 32))
    flying = scheduler.schedule(0.0)
    assert flying is not None
    scheduler.add(sequence([2] * 30))
    short = sequence([3] * 9)
    scheduler.add(short)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert batch.sequences == (short,)
    assert short.table is None
    assert scheduler.schedule(0.0) is None, "the other waits for the first"
    scheduler.landed(flying)
    scheduler.landed(batch)
    assert sum(batch.num_tokens for batch in run(scheduler)) == 16 + 30


def test_who_waits_for_blocks_is_not_kept_waiting_by_those_who_can_do_without() -> None:
    """A stream of short prompts, each of which could have what is free just then."""
    scheduler = scheduler_of(8, chunk=16, seqs=1)
    running = sequence([9] * 12)
    scheduler.add(running)
    flying = [scheduler.schedule(0.0)]
    long = sequence([1] * 32, client="long")
    scheduler.add(long)
    for i in range(20):
        scheduler.add(sequence([100 + i] * 12, client=f"short {i}"))
        batch = scheduler.schedule(float(i))
        assert batch is not None
        if long in batch.sequences:
            return
        flying.append(batch)
        landed = flying.pop(0)
        assert landed is not None
        scheduler.landed(landed)
    pytest.fail("it starves")


def test_who_waits_for_blocks_keeps_them_from_nobody_who_comes_first() -> None:
    """A patient prompt as long as the cache, and urgent ones, of which two fit at a time: two workers run them."""
    scheduler = scheduler_of(12, tokens=16)
    urgent = [sequence([i] * 20) for i in range(9)]
    scheduler.add(urgent[0])
    flying = scheduler.schedule(0.0)
    assert flying is not None
    patient = sequence(list(range(48)))
    patient.priority = 1
    scheduler.add(patient)
    assert scheduler.schedule(0.0) is None, "it waits for the first"
    for seq in urgent[1:]:
        scheduler.add(seq)
    beside = scheduler.schedule(0.0)
    assert beside is not None
    assert urgent[1] in beside.sequences
    scheduler.landed(flying)
    scheduler.landed(beside)
    assert run(scheduler)[-1].sequences == (patient,)


def test_a_prompt_as_long_as_the_cache_is_run_and_one_longer_is_refused() -> None:
    scheduler = scheduler_of(16, tokens=20, chunk=16)
    most = sequence(list(range(64)))
    scheduler.add(most)
    assert sum(batch.num_tokens for batch in run(scheduler)) == 64
    more = sequence(list(range(65)))
    assert not scheduler.fits(more)
    with pytest.raises(ValueError, match="65 tokens do not fit"):
        scheduler.add(more)


def test_after_a_failure_each_runs_alone_and_shares_nothing() -> None:
    scheduler = scheduler_of(30, tokens=64, chunk=32)
    shared = list(range(20))
    sequences = [sequence([*shared, 100 + i]) for i in range(3)]
    for seq in sequences:
        scheduler.add(seq)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert len(batch.sequences) == 3
    scheduler.undone(batch, {sequences[0]})
    batches = run(scheduler)
    assert [batch.counts for batch in batches] == [(21,), (21,)]
    assert sequences[0].table is None


def test_an_empty_cache_is_not_kept_for_one_who_is_not_looked_at() -> None:
    """Whoever waits for blocks may stand behind those that a deal looks at, all of whom need some too."""
    scheduler = Scheduler(40, 5, paging=Paging(BlockPool(12, SIZE), 16), window_tokens=40)
    running = sequence([9] * 48)
    scheduler.add(running)
    flying = scheduler.schedule(0.0)
    assert flying is not None
    low = sequence([1] * 48)
    low.priority = 5
    scheduler.add(low)
    assert scheduler.schedule(0.0) is None, "it waits for blocks"
    high = [sequence([2 + i] * 44) for i in range(3)]
    for seq in high:
        scheduler.add(seq)
    scheduler.abort(running.request_id)
    scheduler.landed(flying, {running})
    assert sum(batch.num_tokens for batch in run(scheduler)) == 3 * 44 + 48
