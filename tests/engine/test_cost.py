"""What a batch costs, and how large batches are made for it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.batch import Batch
from carpool.engine.cost import LEAST_TOKENS, MOST_TOKENS, Cost, _times, measured

SECONDS = st.floats(1e-9, 10)


class Worker:
    """A runner whose time goes by as its clock is told: `fixed` a batch, `per_token`, and more the first time."""

    def __init__(self, fixed: float = 1.0, per_token: float = 0.01) -> None:
        self.cost = Cost(fixed, per_token)
        self.now = 0.0
        self.batches: list[Batch] = []
        self.threads: list[threading.Thread] = []

    def bind(self) -> None:
        self.threads.append(threading.current_thread())

    def run(self, batch: Batch) -> object:
        self.threads.append(threading.current_thread())
        self.now += self.cost.fixed + self.cost.per_token * batch.num_tokens + 5 * (len(self.batches) < 2)
        self.batches.append(batch)
        return None


def batch_of(tokens: int) -> Batch:
    worker = Worker()
    measured([worker], max_model_len=tokens, max_num_seqs=8, vocab_size=9, task="embed")
    return worker.batches[0]


# ── the line ─────────────────────────────────────────────────────────────────────────────────────────────────


@given(SECONDS, SECONDS)
def test_a_line_is_found_again(fixed: float, per_token: float) -> None:
    found = Cost.through((64, fixed + 64 * per_token), (256, fixed + 256 * per_token))
    assert found.fixed == pytest.approx(fixed, rel=1e-3, abs=1e-6 * per_token * 256)
    assert found.per_token == pytest.approx(per_token, rel=1e-3, abs=1e-6 * fixed)


@given(SECONDS, SECONDS)
def test_noise_makes_no_part_negative(few: float, many: float) -> None:
    found = Cost.through((64, few), (256, many))
    assert found.fixed >= 0
    assert found.per_token >= 0


@given(SECONDS, SECONDS)
def test_a_batch_is_as_large_as_its_fixed_part_asks_and_no_larger(fixed: float, per_token: float) -> None:
    cost = Cost(fixed, per_token)
    tokens = cost.batch_tokens()
    assert LEAST_TOKENS <= tokens <= MOST_TOKENS
    assert tokens & (tokens - 1) == 0

    def share(tokens: int) -> float:
        return fixed / (fixed + per_token * tokens)

    assert share(tokens) <= 1 / 32 or tokens == MOST_TOKENS
    assert tokens == LEAST_TOKENS or share(tokens // 2) > 1 / 32, "half of it would have done"


@pytest.mark.parametrize(("fixed", "tokens"), [(0.0, LEAST_TOKENS), (1.0, MOST_TOKENS)])
def test_a_batch_of_nothing_but_one_part(fixed: float, tokens: int) -> None:
    assert Cost(fixed, 1.0 - fixed).batch_tokens() == tokens


@given(SECONDS, SECONDS, st.integers(1, 64))
def test_workers_together_run_what_each_runs_in_full_batches(
    fixed: float, per_token: float, workers: int
) -> None:
    cost = Cost(fixed, per_token)
    seconds = workers * cost.batch_tokens() / cost.tokens_per_second(workers)
    assert seconds == pytest.approx(fixed + per_token * cost.batch_tokens())


def test_a_clock_that_stands_still_makes_no_rate() -> None:
    assert Cost(0.0, 0.0).tokens_per_second(4) == 0.0


# ── measuring it ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_done_once_only_does_not_count() -> None:
    worker = Worker(fixed=0.001, per_token=0.0001)
    few, many = batch_of(64), Batch(batch_of(64).sequences * 4)
    assert _times(worker, few, many, lambda: worker.now) == pytest.approx((0.0074, 0.0266))
    assert 4 <= len(worker.batches) <= 12


def test_a_slow_model_is_tried_once() -> None:
    worker = Worker(fixed=60.0)
    few = batch_of(64)
    assert _times(worker, few, few, lambda: worker.now) == pytest.approx((60.64, 60.64))
    assert len(worker.batches) == 4


def test_all_workers_are_measured_at_once_each_in_one_thread() -> None:
    both = threading.Barrier(2)

    class Waits(Worker):
        def bind(self) -> None:
            super().bind()
            both.wait(10)  # raises unless the other is under way as well

    workers = [Waits(), Waits()]
    assert measured(workers, max_model_len=512, max_num_seqs=8, vocab_size=113, task="classify") is not None
    threads = [set(worker.threads) for worker in workers]
    assert [len(own) for own in threads] == [1, 1]
    assert threads[0] != threads[1]
    for batch in workers[0].batches:
        assert {seq.task for seq in batch.sequences} == {"classify"}
        assert len(batch.distinct()[0].sequences) == len(batch.sequences), "equal ones would be run once"


def test_prompts_are_no_longer_than_the_model_takes() -> None:
    assert batch_of(10).num_tokens == 10


def test_where_batches_are_of_one_prompt_there_is_nothing_to_choose() -> None:
    worker = Worker()
    assert measured([worker], max_model_len=512, max_num_seqs=1, vocab_size=9, task="embed") is None
    assert not worker.batches
