"""Paging: what a batch runs of each prompt, with the cache's help. Pure.

A prompt that is longer than a chunk is run chunk by chunk, beside others; of a prompt whose beginning is known only the
rest is run. Both keep keys and values in the cache's blocks. Whatever needs neither, or finds the cache full, rides
whole as it would without a cache: only prompts that have to be run in chunks ever wait for blocks.
"""

from __future__ import annotations

from carpool.engine.cache.blocks import BlockPool, BlockTable
from carpool.engine.cache.prefixes import Prefixes
from carpool.engine.sequence import Sequence

_LEAST_SHARE = 8  # a chunk is not cut below this part of the largest for the sake of those beside it


class Paging:
    """The cache between batches. A batch that runs a part of a prompt has at most `max_chunk_tokens` tokens in all:
    what rides beside it, and what arrives meanwhile, waits no longer than that takes.
    """

    def __init__(self, pool: BlockPool, max_chunk_tokens: int) -> None:
        if max_chunk_tokens < 1:
            raise ValueError(f"a chunk of {max_chunk_tokens} tokens gets nowhere")
        self.pool = pool
        self.max_chunk_tokens = max_chunk_tokens

    def holds(self, tokens: int) -> bool:
        """Whether a prompt of that many tokens can be kept in the cache, when nothing else is."""
        return tokens <= self.pool.num_blocks * self.pool.block_size

    def landed(self, seq: Sequence, count: int) -> None:
        """`count` more tokens of it have been computed. With the last, its blocks are free, and found by others."""
        seq.computed += count
        if seq.table is not None:
            self.pool.commit(seq.table, seq.computed)
            if not seq.remaining:
                self.drop(seq)

    def drop(self, seq: Sequence) -> None:
        """It is done, was given up, or starts again from nothing."""
        if seq.table is not None:
            self.pool.free(seq.table)
            seq.table = None


class Boarding:
    """One batch that is being filled, to at most `budget` tokens. `total` are aboard."""

    def __init__(self, paging: Paging | None, budget: int) -> None:
        self.total = 0
        self._paging = paging
        self._budget = budget
        self._chunked = False
        # Whether one went without blocks that it needs. Those behind it get none, so that enough come free; who stands
        # before it by the next batch has them first, or a patient prompt would keep urgent ones waiting.
        self._starving = False
        self._tables: list[BlockTable] = []  # of those that come with one, by their place among the prefixes
        self._prefixes = Prefixes(paging.pool.block_size) if paging else None

    def take(self, seq: Sequence, most: int | None = None) -> int:
        """How many tokens of it ride, from `computed` on; 0 if it has to wait. `most` is in place of the budget."""
        room = (self._budget if most is None else most) - self.total
        count = self._whole(seq, room) if seq.prompt is None else self._paged(self._paging, seq, room)
        self.total += count
        if count and seq.table is not None and self._prefixes is not None:
            assert seq.prompt is not None
            self._tables.append(seq.table)
            self._prefixes.add(seq.prompt, seq.computed + count)
        return count

    def _whole(self, seq: Sequence, room: int) -> int:
        return seq.num_tokens if seq.num_tokens <= self._bounded(room) else 0

    def _paged(self, paging: Paging | None, seq: Sequence, room: int) -> int:
        assert paging is not None, "prompts are for those who have a cache"
        assert seq.prompt is not None
        if seq.table is not None:
            count = self._chunk(paging, seq.remaining, room)
            if count:
                self._chunked = True
                paging.pool.extend(seq.table, seq.computed + count)
            return count
        if not paging.holds(seq.num_tokens):
            return self._whole(seq, room)
        long = seq.num_tokens > paging.max_chunk_tokens
        behind = self._leader(seq)
        past = paging.pool.match(seq.prompt, behind)
        left = seq.num_tokens - past
        if left > paging.max_chunk_tokens:
            count = self._chunk(paging, left, room)
        else:
            count = left if left <= self._bounded(room) else 0
        if count and self._allocate(paging, seq, past + count, behind, needed=long):
            self._chunked = self._chunked or count < left
            return count
        return 0 if long else self._whole(seq, room)

    def _allocate(
        self, paging: Paging, seq: Sequence, upto: int, behind: BlockTable | None, needed: bool
    ) -> bool:
        """Give it a table, unless there are too few blocks or one before it, who needs them more, waits for some."""
        assert seq.prompt is not None
        table = None if self._starving else paging.pool.allocate(seq.prompt, upto, behind)
        if table is None:
            self._starving = self._starving or needed
            return False
        seq.table, seq.computed, seq.cached = table, table.cached, table.cached
        return True

    def _chunk(self, paging: Paging, left: int, room: int) -> int:
        """Of `left` tokens those that ride, with at most a chunk's in all."""
        room = min(room, paging.max_chunk_tokens - self.total)
        least = min(left, max(1, paging.max_chunk_tokens // _LEAST_SHARE))
        return min(left, room) if room >= least else 0

    def _bounded(self, room: int) -> int:
        """The room for one beside a chunk, if one is aboard."""
        if not self._chunked:
            return room
        assert self._paging is not None
        return min(room, self._paging.max_chunk_tokens - self.total)

    def _leader(self, seq: Sequence) -> BlockTable | None:
        """The table of one aboard who computes what this one begins with."""
        assert self._prefixes is not None
        assert seq.prompt is not None
        place = self._prefixes.find(seq.prompt).behind
        return None if place is None else self._tables[place]
