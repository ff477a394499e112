"""The scheduler as a card game: whatever is added, aborted and dealt, in whatever order."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from carpool.engine import fair_queue
from carpool.engine.batch import Batch
from carpool.engine.params import PoolingParams, Task
from carpool.engine.scheduler import Scheduler
from carpool.engine.sequence import Sequence

PARAMS = PoolingParams()
_ids = count()


def add(
    scheduler: Scheduler,
    *lengths: int,
    request: int | None = None,
    client: str = "",
    priority: int = 0,
    deadline: float | None = None,
) -> list[Sequence]:
    """Queue one request of the given lengths."""
    request_id = next(_ids) if request is None else request
    sequences = [
        Sequence(request_id, i, [0] * n, PARAMS, deadline=deadline, priority=priority, client=client)
        for i, n in enumerate(lengths)
    ]
    for seq in sequences:
        scheduler.add(seq)
    return sequences


def deals(scheduler: Scheduler, now: float = 0.0) -> Iterator[Batch]:
    """Batches until nothing waits."""
    while (batch := scheduler.schedule(now)) is not None:
        yield batch


def served(batches: list[Batch]) -> Counter[str]:
    """Tokens by client."""
    tokens: Counter[str] = Counter()
    for batch in batches:
        for seq in batch.sequences:
            tokens[seq.client] += seq.num_tokens
    return tokens


# ── any history ──────────────────────────────────────────────────────────────────────────────────────────────


class AnyHistory(RuleBasedStateMachine):
    """Beside the scheduler runs the simplest model of it: the set of what waits."""

    MAX_TOKENS, MAX_SEQS, MIN_SHARE = 40, 5, 8
    BATCH_TOKENS, WORKERS = 30, 1
    BY_LENGTH = True

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            self.MAX_TOKENS,
            self.MAX_SEQS,
            batch_tokens=self.BATCH_TOKENS,
            workers=self.WORKERS,
            by_length=self.BY_LENGTH,
            min_share_tokens=self.MIN_SHARE,
        )
        self.waiting: dict[Sequence, None] = {}  # in order of arrival
        self.now = 0.0

    @rule(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
        client=st.sampled_from(["", "a", "b"]),
        priority=st.sampled_from([-1, 0, 0, 0, 5]),
        patience=st.none() | st.floats(0, 3),
    )
    def arrives(self, lengths: list[int], client: str, priority: int, patience: float | None) -> None:
        deadline = None if patience is None else self.now + patience
        sequences = add(self.scheduler, *lengths, client=client, priority=priority, deadline=deadline)
        self.waiting.update(dict.fromkeys(sequences))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted({seq.request_id for seq in self.waiting})))
        gone = [seq for seq in self.waiting if seq.request_id == request]
        assert self.scheduler.abort(request) == len(gone)
        assert self.scheduler.abort(request) == 0, "what is gone cannot be dropped twice"
        for seq in gone:
            del self.waiting[seq]

    @rule()
    def a_stranger_leaves(self) -> None:
        assert self.scheduler.abort(-1) == 0

    @rule(seconds=st.floats(0, 1))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(idle=st.integers(1, 4))
    def a_batch_is_dealt(self, idle: int) -> None:
        tokens_before = self.scheduler.waiting_tokens
        batch = self.scheduler.schedule(self.now, idle)
        dropped = self.scheduler.take_expired()
        for seq in dropped:
            assert seq.deadline is not None
            assert seq.deadline <= self.now
            del self.waiting[seq]  # a KeyError is a sequence that left twice
        alive = [seq for seq in self.waiting if seq.deadline is None or seq.deadline > self.now]
        if batch is None:
            assert not alive, "work-conserving: whatever waits is dealt at once"
            return
        of_all = max(self.BATCH_TOKENS // 4, -(-tokens_before // self.WORKERS))
        self._check_batch(batch, alive, min(of_all, max(self.MIN_SHARE, -(-tokens_before // idle))))
        for seq in batch.sequences:
            del self.waiting[seq]

    def _check_batch(self, batch: Batch, alive: list[Sequence], share: int) -> None:
        budget = min(self.BATCH_TOKENS, share)
        riders = set(batch.sequences)
        assert len(riders) == len(batch.sequences) <= self.MAX_SEQS
        assert batch.num_tokens <= budget or len(riders) == 1
        assert batch.num_tokens <= self.MAX_TOKENS
        assert riders <= set(alive), "only what waits and is in time may ride"
        assert any(seq.priority == min(s.priority for s in alive) for seq in riders)
        for left in set(alive) - riders:
            lower = [seq for seq in riders if seq.priority > left.priority]
            if lower:
                room = budget - sum(seq.num_tokens for seq in riders if seq.priority <= left.priority)
                assert left.num_tokens > room, "a lower priority took a place that a higher one could use"
            for seq in riders:
                if seq.request_id == left.request_id and seq.num_tokens == left.num_tokens:
                    assert seq.index < left.index, "equals of one request ride in order"

    @invariant()
    def counters_are_exact(self) -> None:
        assert self.scheduler.waiting_sequences == len(self.waiting)
        assert self.scheduler.waiting_tokens == sum(seq.num_tokens for seq in self.waiting)

    def teardown(self) -> None:
        while self.waiting:
            self.a_batch_is_dealt(1)
        assert self.scheduler.schedule(self.now) is None
        assert_forgotten(self.scheduler)


class AnyHistoryOfThree(AnyHistory):
    """Of three workers, and of batches that are filled up to the most."""

    BATCH_TOKENS, WORKERS = 40, 3


class AnyHistoryInFairOrder(AnyHistory):
    """Of batches whose price does not depend on which lengths are in them."""

    BY_LENGTH = False


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyHistoryOfThree = AnyHistoryOfThree.TestCase
TestAnyHistoryOfThree.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestAnyHistoryInFairOrder = AnyHistoryInFairOrder.TestCase
TestAnyHistoryInFairOrder.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def assert_forgotten(scheduler: Scheduler) -> None:
    """No container inside holds anything."""
    held = {
        name: value for name, value in vars(scheduler).items() if isinstance(value, dict | list) and value
    }
    assert not held


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [0, 11])
def test_what_can_never_ride_is_not_queued(length: int) -> None:
    scheduler = Scheduler(10, 4)
    with pytest.raises(ValueError, match=str(length)):
        add(scheduler, length)
    assert scheduler.schedule(0.0) is None
    assert_forgotten(scheduler)


def test_a_batch_fills_up_to_max_num_seqs() -> None:
    """Also when that is more than the scheduler looks at by default."""
    scheduler = Scheduler(10_000, 600)
    add(scheduler, *[1] * 700)
    assert [len(batch.sequences) for batch in deals(scheduler)] == [600, 100]


@pytest.mark.parametrize("idle", [1, 4])
def test_all_that_is_asked_of_one_prompt_rides_together(idle: int) -> None:
    """One list of ids of which three results are asked takes the room of one."""
    scheduler = Scheduler(max_num_batched_tokens=1000, max_num_seqs=8, min_share_tokens=10)
    tasks: tuple[Task, ...] = ("embed", "token_embed", "sparse_embed")
    prompts = [[i] * length for i, length in enumerate((600, 300, 600))]
    for ids in prompts:
        for task in tasks:
            scheduler.add(Sequence(7, 0, ids, PARAMS, task))
    seen: list[int] = []
    while (batch := scheduler.schedule(0.0, idle)) is not None:
        asked = Counter(seq.token_ids[0] for seq in batch.sequences)
        assert set(asked.values()) == {len(tasks)}
        assert sum(len(prompts[prompt]) for prompt in asked) <= 1000
        seen += asked
    assert sorted(seen) == [0, 1, 2]


def test_a_batch_is_in_rising_order_of_length() -> None:
    scheduler = Scheduler(100, 10)
    add(scheduler, 5, 1, 9, 1, 5)
    (batch,) = deals(scheduler)
    assert [seq.num_tokens for seq in batch.sequences] == [1, 1, 5, 5, 9]


def test_the_expired_never_ride_and_are_handed_over_once() -> None:
    scheduler = Scheduler(100, 10)
    late = add(scheduler, 3, 3, deadline=1.0)
    (in_time,) = add(scheduler, 3, deadline=1.5)
    batch = scheduler.schedule(1.0)
    assert batch is not None
    assert batch.sequences == (in_time,)
    assert scheduler.take_expired() == late
    assert scheduler.take_expired() == []


def test_a_request_whose_last_sequence_expired_is_forgotten_though_others_wait() -> None:
    scheduler = Scheduler(10, 1)
    add(scheduler, 3, deadline=1.0)
    add(scheduler, 3, 3)
    scheduler.schedule(2.0)
    assert len(scheduler._queue._requests) == 1


# ── shares of idle workers ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("idle", [1, 2, 3, 4])
def test_a_short_queue_is_shared_by_idle_workers(idle: int) -> None:
    scheduler = Scheduler(2048, 256)
    add(scheduler, *[100] * 12)
    dealt = []
    for workers in range(idle, 0, -1):  # each batch leaves one worker fewer idle
        batch = scheduler.schedule(0.0, workers)
        assert batch is not None
        dealt.append(len(batch.sequences))
    assert dealt == [12 // idle] * idle


def test_the_last_of_a_backlog_is_left_in_part_for_those_who_are_busy_yet() -> None:
    """Else one runs all of it while the others, done a moment later, have nothing to do."""
    scheduler = Scheduler(2048, 256, workers=2)
    add(scheduler, *[100] * 33)
    dealt = [batch.num_tokens for batch in deals(scheduler)]  # whenever one is idle, the other is busy
    assert dealt == [1600, 800, 500, 400]
    assert [batch.num_tokens for batch in backlog_of_one(*[100] * 33)] == [2000, 1300]


def backlog_of_one(*lengths: int) -> Iterator[Batch]:
    scheduler = Scheduler(2048, 256)
    add(scheduler, *lengths)
    return deals(scheduler)


def test_batches_are_filled_to_what_is_best_and_only_a_longer_prompt_goes_beyond() -> None:
    scheduler = Scheduler(2048, 256, batch_tokens=512)
    (long,) = add(scheduler, 1500)
    add(scheduler, *[100] * 12)
    first, *others = deals(scheduler)
    assert first.sequences == (long,), "nobody waits for more than he must"
    assert [batch.num_tokens for batch in others] == [500, 500, 200]


def test_a_batch_is_full_at_what_is_best() -> None:
    scheduler = Scheduler(2048, 256, batch_tokens=512)
    add(scheduler, *[100] * 5)
    assert not scheduler.fills_a_batch
    add(scheduler, 12)
    assert scheduler.fills_a_batch


def test_a_handful_of_tokens_is_not_torn_apart_for_idle_workers() -> None:
    scheduler = Scheduler(2048, 256)
    add(scheduler, 50, 50)
    batch = scheduler.schedule(0.0, idle_workers=8)
    assert batch is not None
    assert batch.num_tokens == 100


@pytest.mark.parametrize(
    ("lengths", "fills"), [([5, 4], False), ([5, 5], True), ([1, 1], False), ([1, 1, 1], True), ([], False)]
)
def test_a_batch_is_full_once_nothing_more_fits_it(lengths: list[int], fills: bool) -> None:
    scheduler = Scheduler(10, 3)
    add(scheduler, *lengths)
    assert scheduler.fills_a_batch is fills


# ── length grouping and its bound ────────────────────────────────────────────────────────────────────────────


def test_similar_lengths_ride_together() -> None:
    scheduler = Scheduler(1000, 64)
    add(scheduler, *[10, 90] * 20)
    first, second = next(deals(scheduler)), next(deals(scheduler))
    assert {seq.num_tokens for seq in first.sequences[:20]} == {10}
    assert {seq.num_tokens for seq in second.sequences} == {90}


def test_where_lengths_do_not_matter_all_ride_in_fair_order() -> None:
    scheduler = Scheduler(1000, 64, by_length=False)
    sequences = add(scheduler, *[10, 90] * 20)
    dealt = [seq for batch in deals(scheduler) for seq in sorted(batch.sequences, key=lambda seq: seq.index)]
    assert dealt == sequences
    assert all(seq.overtaken_at is None for seq in sequences)


def test_where_lengths_do_not_matter_only_who_does_not_fit_is_passed_and_is_next() -> None:
    scheduler = Scheduler(100, 64, by_length=False, min_share_tokens=1)
    first, long, short, last = add(scheduler, 60, 70, 40, 5)
    assert [set(batch.sequences) for batch in deals(scheduler)] == [{first, short}, {long, last}]


def test_nobody_is_overtaken_for_longer_than_allowed() -> None:
    """A short text behind long ones that are always better matched, and far from the head of its request."""
    scheduler = Scheduler(100, 64, max_overtaken_s=0.25, window_tokens=100_000)
    (misfit,) = [seq for seq in add(scheduler, *[60] * 20, 5, *[60] * 50, *[40] * 100) if seq.num_tokens == 5]
    rode_at = None
    for step in range(20):
        batch = scheduler.schedule(step * 0.1)
        assert batch is not None
        if misfit in batch.sequences:
            rode_at = step
            break
    assert rode_at is not None
    assert rode_at > 0, "this test needs it to be overtaken at first"
    assert rode_at * 0.1 <= 0.25 + 0.1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 3)), min_size=1, max_size=60), st.floats(0.01, 0.2)
)
def test_the_overdue_make_room_only_for_the_first_in_fair_order(
    arrivals: list[tuple[int, int]], step: float
) -> None:
    scheduler = Scheduler(100, 64, max_overtaken_s=0.25, window_tokens=100_000)
    waiting = {seq for n, client in arrivals for seq in add(scheduler, n, client=str(client))}
    now = 0.0
    while waiting:
        overdue = {s for s in waiting if s.overtaken_at is not None and now - s.overtaken_at >= 0.25}
        batch = scheduler.schedule(now)
        assert batch is not None
        others = [seq.num_tokens for seq in batch.sequences if seq not in overdue]
        for left in overdue - set(batch.sequences):
            # The first may be one of the others, or one of the overdue: either way there was no room left.
            taken = sum(seq.num_tokens for seq in batch.sequences if seq in overdue)
            assert not others or taken + max(others) + left.num_tokens > 100
        waiting -= set(batch.sequences)
        now += step


def test_no_overtaking_between_priorities() -> None:
    """However well the lengths of a lower priority would suit."""
    scheduler = Scheduler(100, 64)
    low = add(scheduler, *[10] * 20, priority=1)
    high = add(scheduler, 10, 60, 30, priority=0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert set(batch.sequences) == set(high)
    assert all(seq.overtaken_at is None for seq in low)


# ── fairness ─────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=80, deadline=None)
@given(
    flood=st.lists(st.integers(1, 100), min_size=30, max_size=120),
    floods=st.integers(1, 4),
    warm=st.integers(0, 10),
    length=st.integers(1, 100),
    own_client=st.booleans(),
)
def test_a_flood_never_delays_a_single_text_by_more_than_a_batch_each(
    flood: list[int], floods: int, warm: int, length: int, own_client: bool
) -> None:
    """Whether the floods come from other clients or are other requests of the same one. Time stands still here,
    so that fairness alone must do it, not the bound on overtaking."""
    scheduler = Scheduler(100, 8)
    for i in range(floods):
        add(scheduler, *flood * 4, client=str(i) if own_client else "same")
    for _ in range(warm):
        scheduler.schedule(0.0)
    (single,) = add(scheduler, length, client="me" if own_client else "same")
    passed = 0
    for batch in deals(scheduler):
        if single in batch.sequences:
            break
        passed += batch.num_tokens
    assert passed <= (floods + 1) * 100


def tokens_until(scheduler: Scheduler, total: int) -> Counter[str]:
    batches: list[Batch] = []
    while sum(batch.num_tokens for batch in batches) < total:
        batch = scheduler.schedule(0.0)
        assert batch is not None
        batches.append(batch)
    return served(batches)


def assert_even(tokens: Counter[str], *clients: str, slack: int = 500) -> None:
    """Within the few batches that length grouping may shift."""
    assert max(tokens[c] for c in clients) - min(tokens[c] for c in clients) <= slack


def test_clients_get_equal_tokens_whatever_their_lengths() -> None:
    scheduler = Scheduler(100, 16)
    add(scheduler, *[5] * 1000, client="short")
    add(scheduler, *[50] * 100, client="long")
    add(scheduler, *[7, 90, 1] * 60, client="mixed")
    assert_even(tokens_until(scheduler, 6000), "short", "long", "mixed")


def test_requests_of_one_client_get_equal_tokens() -> None:
    scheduler = Scheduler(100, 16)
    many, few = add(scheduler, *[10] * 1000), add(scheduler, *[10] * 100)
    riders: Counter[int] = Counter()
    for _ in range(20):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        riders.update(seq.request_id for seq in batch.sequences)
    assert abs(riders[many[0].request_id] - riders[few[0].request_id]) <= 10


def test_a_new_request_does_not_hold_the_past_against_an_older_one() -> None:
    scheduler = Scheduler(100, 16)
    (older, *_) = add(scheduler, *[10] * 2000)
    tokens_until(scheduler, 8000)
    add(scheduler, *[10] * 2000)
    riders = 0
    for _ in range(40):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        riders += sum(seq.request_id == older.request_id for seq in batch.sequences)
    assert 150 <= riders <= 250  # of 400


def test_a_client_with_many_requests_gets_no_more_than_one_with_few() -> None:
    scheduler = Scheduler(100, 16)
    for _ in range(300):
        add(scheduler, 10, client="many")
    add(scheduler, *[10] * 300, client="one")
    assert_even(tokens_until(scheduler, 3000), "many", "one")


def test_a_client_that_idles_saves_nothing_up() -> None:
    scheduler = Scheduler(100, 16)
    add(scheduler, 10, client="idler")
    add(scheduler, *[10] * 2000, client="busy")
    tokens_until(scheduler, 8000)
    add(scheduler, *[10] * 2000, client="idler")
    assert_even(tokens_until(scheduler, 4000), "idler", "busy")


def test_a_client_that_was_alone_owes_nothing() -> None:
    scheduler = Scheduler(100, 16)
    add(scheduler, *[10] * 2000, client="early")
    tokens_until(scheduler, 8000)
    add(scheduler, *[10] * 2000, client="late")
    assert_even(tokens_until(scheduler, 4000), "early", "late")


def test_a_priority_that_ran_dry_starts_afresh_though_others_wait() -> None:
    """What a client was given while its priority had nobody else is not held against it later."""
    scheduler = Scheduler(100, 16)
    add(scheduler, *[10] * 5000, client="background", priority=9)
    add(scheduler, *[10] * 1000, client="early")
    assert tokens_until(scheduler, 10_000)["early"] == 10_000
    add(scheduler, *[10] * 1000, client="late")
    add(scheduler, *[10] * 1000, client="early")
    assert_even(tokens_until(scheduler, 4000), "early", "late")


def test_one_text_at_a_time_takes_no_more_than_its_share() -> None:
    """A client that sends its next long text when the last has left must not jump the queue each time."""
    scheduler = Scheduler(100, 16)
    add(scheduler, *[10] * 3000, client="flood")
    add(scheduler, 100, client="drip")
    tokens: Counter[str] = Counter()
    for _ in range(200):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        tokens += served([batch])
        if any(seq.client == "drip" for seq in batch.sequences):
            add(scheduler, 100, client="drip")
    assert tokens["drip"] <= tokens["flood"] + 500


# ── cost and memory ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ["one request", "many requests", "many clients"])
def test_the_cost_of_a_deal_does_not_grow_with_what_waits(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(2048, 256)
    total = 50_000
    if shape == "one request":
        add(scheduler, *[8] * total)
    for i in range(total if shape != "one request" else 0):
        add(scheduler, 8, client=str(i) if shape == "many clients" else "")
    operations = 0

    def counted(function: object) -> object:
        def call(*args: object) -> object:
            nonlocal operations
            operations += 1
            return function(*args)  # type: ignore[operator]

        return call

    counting = SimpleNamespace(heappush=counted(heapq.heappush), heappop=counted(heapq.heappop))
    monkeypatch.setattr(fair_queue, "heapq", counting)
    costs = []
    for _ in range(20):
        before = operations
        assert scheduler.schedule(0.0) is not None
        costs.append(operations - before)
    assert max(costs) <= 12 * 256


def heap_entries(scheduler: Scheduler) -> int:
    flows = {flow for entry in scheduler._queue._classes.values() for flow in [entry]}
    total = 0
    while flows:
        flow = flows.pop()
        total += len(flow._children)
        flows |= {child for _, _, child in flow._children}
    return total


def test_memory_does_not_grow_while_the_queue_never_empties() -> None:
    """New clients come and go for ever, some leave before their turn, and something always waits."""
    scheduler = Scheduler(200, 16)
    sizes = []
    for round_ in range(3000):
        add(scheduler, 10, 90, 20, client=f"client {round_}")
        (late,) = add(scheduler, 30, client=f"impatient {round_}")
        while scheduler.waiting_tokens > 1000:
            scheduler.schedule(round_ * 0.01)
        scheduler.abort(late.request_id)
        if round_ % 500 == 499:
            assert scheduler.waiting_sequences
            sizes.append(
                heap_entries(scheduler) + len(scheduler._queue._requests) + remembered_clients(scheduler)
            )
    assert sizes[-1] <= 3 * sizes[0] + 100


def remembered_clients(scheduler: Scheduler) -> int:
    return sum(len(clients) for clients in scheduler._queue._clients.values())
