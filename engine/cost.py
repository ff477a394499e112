"""Cost: what a batch takes a CPU worker by its number of tokens, measured at load; and how large batches had best be.

A batch of n tokens takes `fixed + per_token * n`: the fixed part is calls, and weights that come from memory. Once it
is a small part of the whole, larger batches only make others wait longer, and find less of themselves in the caches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from carpool.engine.batch import Batch
from carpool.engine.params import PoolingParams, Task
from carpool.engine.sequence import Sequence

LEAST_TOKENS, MOST_TOKENS = 256, 2048  # above, no model that was measured gained: docs/log.md
_FIXED_SHARE = 1 / 32  # of what a batch takes, when it is large enough
_LENGTH = 64  # tokens of each prompt that is tried
_FEW, _MANY = 1, 4  # prompts: two sizes make a line
_BUDGET_S = 0.25  # of a worker's time, after its first passes; at least one pass of each size
_ROUNDS = 5


class Runner(Protocol):
    """What is measured: see `engine/runner.py`."""

    def bind(self) -> None:
        """Called once in the thread that runs."""

    def run(self, batch: Batch) -> object:
        """Run a batch as it is served."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a batch takes: `fixed`, and `per_token` for each."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> Cost:
        """The line through two batches, each (tokens, seconds), of which the second is the larger.

        Noise may have made either part of it negative: then that is 0.
        """
        slope = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
        return cls(max(0.0, few[1] - slope * few[0]), slope)

    def batch_tokens(self) -> int:
        """Up to how many tokens batches are filled: a power of two, so that noise seldom changes it."""
        tokens = LEAST_TOKENS
        while tokens < MOST_TOKENS and self.fixed > _FIXED_SHARE * (self.fixed + self.per_token * tokens):
            tokens *= 2
        return tokens

    def tokens_per_second(self, workers: int) -> float:
        """What so many workers run together, in batches as full as they should be; 0 if no time went by."""
        tokens = self.batch_tokens()
        seconds = self.fixed + self.per_token * tokens
        return workers * tokens / seconds if seconds else 0.0


def measured(
    runners: Seq[Runner], *, max_model_len: int, max_num_seqs: int, vocab_size: int, task: Task
) -> Cost | None:
    """What a batch costs when all workers are busy, as they are when it counts; None if no two sizes can be tried.

    In processor time of each thread, so that other work on the machine disturbs little. A model that fails is left
    for the warm-up to report.
    """
    length = min(_LENGTH, max_model_len)
    if max_num_seqs < _MANY:
        return None
    few, many = (_batch(number, length, vocab_size, task) for number in (_FEW, _MANY))
    with ThreadPoolExecutor(len(runners), thread_name_prefix="carpool-cost") as pool:
        times = list(pool.map(lambda runner: _times(runner, few, many), runners))
    one, other = (fmean(column) for column in zip(*times, strict=True))
    return Cost.through((few.num_tokens, one), (many.num_tokens, other))


def _times(
    runner: Runner, few: Batch, many: Batch, clock: Callable[[], float] = time.thread_time
) -> tuple[float, float]:
    """Seconds of each, the least of a few rounds, in the thread that calls."""
    runner.bind()
    for batch in (few, many):
        runner.run(batch)  # what is done once only
    rounds: list[tuple[float, float]] = []
    start = clock()
    while len(rounds) < _ROUNDS and (not rounds or clock() - start < _BUDGET_S):
        before = clock()
        runner.run(few)
        between = clock()
        runner.run(many)
        rounds.append((between - before, clock() - between))
    one, other = zip(*rounds, strict=True)
    return min(one), min(other)


def _batch(number: int, length: int, vocab_size: int, task: Task) -> Batch:
    """So many prompts of words by chance: experts and adapters meet what they meet in service, more or less."""
    words = random.Random(length)
    prompts = [words.choices(range(vocab_size), k=length) for _ in range(number)]
    return Batch.of([Sequence(0, i, ids, PoolingParams(), task) for i, ids in enumerate(prompts)])
