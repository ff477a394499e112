"""Scheduler: which sequences ride next. A pure card game: no tensors, no clock, no I/O; time is an argument.

* Work-conserving: whenever something waits, `schedule` deals a batch. There is no timer.
* Fair (`fair_queue.py`): priority first; then the client that was served the fewest tokens; then that client's request
  that was served the fewest; then order of arrival. A request of 2,048 texts cannot starve a request of one.
* Length-aware, where that makes a batch cheaper: of the next few in fair order, those near the first one's length ride
  along with it, but none is overtaken for longer than `max_overtaken_s`.
* Of a prompt that has a cache to help it a batch may run a part only (`cache/paging.py`); then it waits again, before
  the rest of its request. Each is charged for the tokens that are run of it.
* Of sequences that are twins the first in fair order is dealt, and charged; the others rest meanwhile (`twins.py`).
"""

from __future__ import annotations

from collections.abc import Container

from carpool.engine.batch import Batch
from carpool.engine.cache.blocks import Prompt
from carpool.engine.cache.paging import Boarding, Paging
from carpool.engine.fair_queue import FairQueue
from carpool.engine.sequence import Sequence
from carpool.engine.twins import Twins

_MAX_CANDIDATES = 256  # waiting sequences that one deal looks at (or max_num_seqs): bounds what a deal costs
_FILLERS = 8  # sequences behind a full batch's worth that one looks at for some that fit what is left of it
_LEAST_PART = 4  # a batch is not cut below this part of a full one for workers that are busy yet


class Scheduler:
    """Deals batches of at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences.

    With `paging`, prompts may be run in chunks and share prefixes; every batch is then to be reported to `landed` or
    `undone`.

    Batches are filled up to `batch_tokens` (default: the most); only a prompt that is longer goes beyond, by itself.
    `window_tokens` is how far ahead in fair order a deal looks for sequences of similar length (default: four
    batches); with `by_length` false it does not look for them. When several workers are idle a short queue is dealt in
    equal shares, none below `min_share_tokens`; and a part of it is left for those of the `workers` that are busy yet,
    so that the last of a backlog keeps all busy.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        *,
        batch_tokens: int | None = None,
        workers: int = 1,
        by_length: bool = True,
        max_overtaken_s: float = 0.25,
        window_tokens: int | None = None,
        min_share_tokens: int = 128,
        paging: Paging | None = None,
    ) -> None:
        self._paging = paging
        self._queue = FairQueue()
        self._begun: dict[Sequence, None] = {}  # those that wait for their next chunk
        self._max_tokens = max_num_batched_tokens
        self._batch_tokens = min(batch_tokens or max_num_batched_tokens, max_num_batched_tokens)
        self._max_seqs = max_num_seqs
        self._workers = workers
        self._by_length = by_length
        self._max_overtaken_s = max_overtaken_s
        window = 4 * self._batch_tokens if window_tokens is None else window_tokens
        self._window_tokens, self._fillers = (window, 0) if by_length else (0, _FILLERS)
        self._min_share_tokens = min_share_tokens
        self._max_candidates = max(_MAX_CANDIDATES, max_num_seqs)
        self._twins = Twins()
        self._expired: list[Sequence] = []

    @property
    def waiting_tokens(self) -> int:
        """Still to be run of all that wait."""
        return self._queue.num_tokens

    @property
    def waiting_sequences(self) -> int:
        return self._queue.num_sequences

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; it must `fit`. The sequences of a request share its priority."""
        if not self.fits(seq):
            raise ValueError(f"{seq.num_tokens} tokens do not fit a batch of {self._max_tokens}")
        self._wait(seq)

    def fits(self, seq: Sequence) -> bool:
        """Whether it can be run at all: whole in a batch by itself or, with the cache's help, in chunks."""
        in_chunks = self._paging is not None and seq.prompt is not None and self._paging.holds(seq.num_tokens)
        return 0 < seq.num_tokens <= self._max_tokens or in_chunks

    def _wait(self, seq: Sequence) -> None:
        """Behind the rest of its request or, if it has begun, before it; nowhere if it rests."""
        if self._twins.rests(seq):
            return
        begun = seq.table is not None
        self._queue.add(seq, first=begun)
        if begun:
            self._begun[seq] = None

    def abort(self, request_id: int) -> int:
        """Drop what still waits or rests of a request; returns how many sequences that were."""
        rested = self._twins.forget_resting(request_id)
        dropped = self._queue.drop(request_id)
        for seq in dropped:
            self._give_up(seq)
            self._twins.forget(seq)
            self._rouse(seq)
        self._queue.settle()
        return rested + len(dropped)

    def schedule(self, now: float, idle_workers: int = 1) -> Batch | None:
        """Deal the next batch, or None if nothing waits. What has expired never rides: see `take_expired`."""
        if not self._queue.num_sequences:
            return None
        budget = self._share(idle_workers)
        candidates = self._pick(max(budget, self._window_tokens), now)
        if not candidates:
            self._queue.settle(self._expired)
            return None
        chosen = self._choose(candidates, budget, now)
        if len(chosen) < len(candidates):
            self._put_back(candidates, chosen, now)
        if not chosen and self._begun:
            # All that was looked at waits for blocks, and those who hold some stand further back.
            chosen = self._next_chunk(next(iter(self._begun)))
            candidates = list(chosen)
        for seq, tokens in chosen.items():
            for twin in self._twins.leads(seq, lands=tokens == seq.remaining):
                self._queue.remove(twin)  # it rests from now on
                self._give_up(twin)
                candidates.append(twin)
        self._queue.settle((*candidates, *self._expired))
        return Batch.of(list(chosen), chosen) if chosen else None

    @property
    def is_paged(self) -> bool:
        """Whether it keeps anything for what rides, and so has to know how every batch went."""
        return self._paging is not None

    def landed(self, batch: Batch, gone: Container[Sequence] = (), failed: Container[Sequence] = ()) -> None:
        """The batch was run. Those with more to do wait again; nothing is kept of the `gone`, whose request ended, nor
        of the `failed`. The twins of those that have a result, if only a failure, go on resting: see `take_twins`.
        """
        if self._paging is None:
            return
        for seq, tokens in zip(batch.sequences, batch.counts, strict=True):
            if seq in failed:
                self._give_up(seq)
                continue
            if seq in gone:
                self._give_up(seq)
                if tokens < seq.remaining:
                    self._rouse(seq)
                continue
            self._paging.landed(seq, tokens)
            if seq.remaining:
                self._wait(seq)

    def undone(self, batch: Batch, gone: Container[Sequence] = ()) -> None:
        """The batch failed, and one of its sequences may have read what another should have written: none of it counts.

        Each starts again from nothing, in a batch of its own, but for the `gone`; so do their twins.
        """
        for first in batch.sequences:
            self._give_up(first)
            for seq in (first, *self._twins.take(first)):
                seq.computed, seq.cached, seq.alone = 0, 0, True
                if seq.prompt is not None:
                    seq.prompt = Prompt(seq.num_tokens, reuse=False)
                if seq not in gone:
                    self._wait(seq)

    def take_twins(self, seq: Sequence) -> list[Sequence]:
        """Those that rested while it was run, each exactly once: its result is theirs."""
        return self._twins.take(seq)

    def _rouse(self, seq: Sequence) -> None:
        """It leaves without a result: its twins wait again, each in its own place."""
        for twin in self._twins.take(seq):
            self._wait(twin)

    def _give_up(self, seq: Sequence) -> None:
        """Take back what it holds of the cache."""
        self._begun.pop(seq, None)
        if self._paging is not None:
            self._paging.drop(seq)

    def _next_chunk(self, seq: Sequence) -> dict[Sequence, int]:
        """Take one that has begun out of the middle of the queue, and run its next chunk by itself."""
        tokens = Boarding(self._paging, self._max_tokens).take(seq)
        del self._begun[seq]
        self._queue.remove(seq, tokens)
        return {seq: tokens}

    @property
    def fills_a_batch(self) -> bool:
        """Whether so much waits that nothing to come could still join the next batch."""
        waiting = self._queue
        return waiting.num_tokens >= self._batch_tokens or waiting.num_sequences >= self._max_seqs

    def take_expired(self) -> list[Sequence]:
        """The sequences that were dropped because their deadline had passed, each exactly once."""
        expired, self._expired = self._expired, []
        for seq in expired:
            self._rouse(seq)
        return expired

    def _share(self, idle_workers: int) -> int:
        """Tokens one batch may hold so that every worker gets its part of a short queue: small ones if it is idle."""
        waiting = self._queue.num_tokens
        share = -(-waiting // max(1, idle_workers))
        of_all = -(-waiting // self._workers)
        return min(
            self._batch_tokens,
            max(share, self._min_share_tokens),
            max(of_all, self._batch_tokens // _LEAST_PART),
        )

    def _choose(self, candidates: list[Sequence], budget: int, now: float) -> dict[Sequence, int]:
        """The first in fair order; then, priority by priority, the overdue and those nearest to it in length, or, where
        lengths do not matter, the next.

        Each with the tokens that are run of it. Nobody is chosen only if all would have to wait for the cache.
        """
        if len(candidates) == 1 and self._paging is None:
            return {seq: seq.num_tokens for seq in candidates}
        boarding = Boarding(self._paging, budget)
        chosen: dict[Sequence, int] = {}
        charged = {seq: seq.remaining for seq in candidates}
        behind = iter(candidates)
        for first in behind:
            if tokens := boarding.take(first, self._max_tokens):  # it rides even if its share is smaller
                chosen[first] = tokens
                break
        else:
            return chosen

        def rank(seq: Sequence) -> tuple[int, bool, int]:
            if seq.overtaken_at is not None and now - seq.overtaken_at >= self._max_overtaken_s:
                return seq.priority, False, 0
            return seq.priority, True, abs(charged[seq] - charged[first])

        # A prompt of which several results are asked is one list, and is run once.
        aboard = {id(first.token_ids)}
        keys = {first.key}
        # Stable: those of equal rank stay in fair order.
        others = sorted(behind, key=rank) if self._by_length else behind
        for seq in () if first.alone else others:
            if len(chosen) == self._max_seqs:
                break
            if seq.alone or (seq.key and seq.key in keys):
                continue
            if id(seq.token_ids) in aboard and seq.prompt is None:
                chosen[seq] = seq.num_tokens
            elif tokens := boarding.take(seq):
                chosen[seq] = tokens
                aboard.add(id(seq.token_ids))
            else:
                continue
            keys.add(seq.key)
        for seq, tokens in chosen.items():
            if tokens < charged[seq]:
                self._queue.charge(seq, tokens - charged[seq])
        return chosen

    def _put_back(self, candidates: list[Sequence], chosen: Container[Sequence], now: float) -> None:
        """Those that were not chosen wait as they did; some were overtaken."""
        last = max((i for i, seq in enumerate(candidates) if seq in chosen), default=-1)
        for i in range(len(candidates) - 1, -1, -1):
            seq = candidates[i]
            if seq not in chosen:
                self._queue.put_back(seq)
                if seq.table is not None:
                    self._begun[seq] = None
                if i < last and seq.overtaken_at is None:
                    seq.overtaken_at = now

    def _pick(self, tokens: int, now: float) -> list[Sequence]:
        """Take sequences in fair order until `tokens` are passed, and the fillers; the expired are set aside."""
        picked: list[Sequence] = []
        total, fillers = 0, self._fillers
        queue = self._queue
        while queue.num_sequences and len(picked) < self._max_candidates:
            if total >= tokens:
                if not fillers:
                    break
                fillers -= 1
            seq = queue.first()
            self._begun.pop(seq, None)
            if seq.deadline is not None and seq.deadline <= now:
                queue.remove(seq)
                self._give_up(seq)
                self._twins.forget(seq)
                self._expired.append(seq)
                continue
            queue.remove(seq, seq.remaining)
            picked.append(seq)
            total += min(seq.remaining, self._batch_tokens)
        return picked
