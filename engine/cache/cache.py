"""Cache: what each prompt of a request may do with the cache of keys and values. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from carpool.engine.cache.blocks import Prompt
from carpool.engine.cache.hashing import block_hashes
from carpool.engine.cache.paging import Paging
from carpool.engine.params import Task
from carpool.engine.stats import CacheStats


@dataclass(frozen=True, slots=True)
class Cache:
    """`last_only` are the tasks whose results are of a prompt's last token alone: what was run for others need not be
    run again for them. `finds_prefixes`: whether it is looked for.
    """

    paging: Paging
    last_only: frozenset[Task]
    finds_prefixes: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that it can hold."""
        return self.paging.pool.num_blocks * self.paging.pool.block_size

    @property
    def stats(self) -> CacheStats:
        pool = self.paging.pool
        return CacheStats(pool.queried_tokens, pool.hit_tokens, pool.num_blocks, pool.num_used)

    def forget(self) -> None:
        """Nothing that has been computed is found any more."""
        self.paging.pool.forget()

    def prompts(
        self,
        token_ids: Seq[list[int]],
        tasks: Seq[Task],
        adapter: int = 0,
        salt: str | None = None,
        type_starts: Seq[int | None] | None = None,
    ) -> list[Prompt | None]:
        """For each prompt what the scheduler is to know of it; None for those that are run whole and by themselves.

        Prompts share what they begin with only on the same adapter, under the same `salt`, and if tokens of type 1
        begin at the same place in both. Takes about 0.1 ms for a thousand tokens.
        """
        size, last_only = self.paging.pool.block_size, self.last_only.issuperset(tasks)
        told: list[Prompt | None] = []
        for ids, start in zip(token_ids, type_starts or [None] * len(token_ids), strict=True):
            hashes: Seq[bytes] = ()
            if last_only and self.finds_prefixes:
                hashes = block_hashes(ids, size, (adapter, salt, start))
            long = len(ids) > self.paging.max_chunk_tokens and self.paging.holds(len(ids))
            told.append(Prompt(len(ids), hashes, last_only) if hashes or long else None)
        return told
