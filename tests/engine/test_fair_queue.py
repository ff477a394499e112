"""The queue by itself: who is first, what is charged, what is kept. Fairness as clients see it: test_scheduler.py."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.fair_queue import FairQueue
from carpool.engine.params import PoolingParams
from carpool.engine.sequence import Sequence

PARAMS = PoolingParams()
_requests = count()


def sequence(
    length: int = 1, client: str = "", priority: int = 0, request: int | None = None, index: int = 0
) -> Sequence:
    number = next(_requests) if request is None else request
    return Sequence(number, index, [0] * length, PARAMS, client=client, priority=priority)


def ride(queue: FairQueue) -> Sequence:
    """The first leaves for good, and is paid for."""
    seq = queue.first()
    queue.remove(seq, seq.remaining)
    queue.settle([seq])
    return seq


class Filing(FairQueue):
    """Files whatever comes, those that wait alone too."""

    def add(self, seq: Sequence, *, first: bool = False) -> None:
        self.num_tokens += seq.remaining
        self.num_sequences += 1
        self._file(seq, first, charged=0)


arrivals = st.tuples(
    st.integers(1, 9), st.sampled_from("abc"), st.sampled_from([0, 0, 0, 1]), st.integers(0, 3)
)


@given(st.lists(arrivals | st.sampled_from(["ride", "ride", "look", "leave"]), max_size=60))
def test_one_that_waits_alone_has_its_turn_as_if_it_were_filed(
    history: list[tuple[int, str, int, int] | str],
) -> None:
    queues = FairQueue(), Filing()
    waiting: list[Sequence] = []
    for event in history:
        if isinstance(event, tuple):
            length, client, priority, request = event
            known = next((s for s in waiting if s.request_id == request), None)
            if known is not None:  # those of one request share its client and priority
                client, priority = known.client, known.priority
            seq = sequence(length, client, priority, request, index=len(waiting))
            waiting.append(seq)
            for queue in queues:
                queue.add(seq)
        elif waiting and event == "leave":
            request = waiting[len(waiting) // 2].request_id
            assert queues[0].drop(request) == queues[1].drop(request)
            waiting = [seq for seq in waiting if seq.request_id != request]
            for queue in queues:
                queue.settle()
        elif waiting and event == "look":
            for queue in queues:
                first = queue.first()
                queue.remove(first, first.remaining)
                queue.put_back(first)
                queue.settle([first])
        elif waiting:
            seq, same = map(ride, queues)
            assert seq is same
            waiting.remove(seq)
        for queue in queues:
            assert queue.num_sequences == len(waiting)
            assert queue.num_tokens == sum(seq.remaining for seq in waiting)
    assert [ride(queues[0]) for _ in waiting] == [ride(queues[1]) for _ in waiting]


def test_one_that_waits_alone_can_leave_in_every_way() -> None:
    queue = FairQueue()
    for leave in (ride, lambda q: q.remove(q.first()), lambda q: q.drop(q.first().request_id)):
        queue.add(sequence(7))
        leave(queue)
        assert (queue.num_sequences, queue.num_tokens) == (0, 0)
    (a, b) = sequence(1), sequence(1)
    queue.add(a)
    queue.add(b)
    assert [ride(queue), ride(queue)] == [a, b]


def test_nothing_is_kept_of_what_has_gone() -> None:
    queue = FairQueue()
    for _ in range(3):
        for client in "abc":
            queue.add(sequence(5, client))
        while queue.num_sequences:
            ride(queue)
        assert (queue._requests, queue._clients, queue._classes, queue._priorities) == ({}, {}, {}, [])


def test_a_charge_counts_until_its_priority_has_nothing_waiting() -> None:
    queue = FairQueue()
    queue.add(sequence(100, "dear"))
    later = [sequence(1, client) for client in ("dear", "cheap")]
    for seq in later:
        queue.add(seq)
    ride(queue)
    assert [ride(queue), ride(queue)] == later[::-1]
