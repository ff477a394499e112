"""Blocks: whatever begins, grows, fails, ends and is forgotten, in whatever order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from carpool.engine.cache.blocks import BlockPool, BlockTable, Prompt
from carpool.engine.cache.hashing import block_hashes
from carpool.engine.cache.prefixes import Prefixes

# What keys and values at a place depend on: what goes before all, and all tokens up to there.
Content = tuple[object, ...]

# Few of them, so that many begin alike and some go on alike: zeros, then ones.
TOKENS = st.tuples(st.integers(1, 14), st.integers(0, 14)).map(
    lambda at: [int(i >= at[1]) for i in range(at[0])]
)
EXTRA = st.sampled_from([(), (), (), (1, "salt"), (2, "salt")])


def asked(tokens: Seq[int], block_size: int, *extra: int | str, reuse: bool = True) -> Prompt:
    return Prompt(len(tokens), block_hashes(tokens, block_size, extra), reuse)


def begun(
    pool: BlockPool, tokens: Seq[int], *extra: int | str, behind: BlockTable | None = None
) -> BlockTable:
    """A prompt, begun whole."""
    table = pool.allocate(asked(tokens, pool.block_size, *extra), len(tokens), behind)
    assert table is not None
    return table


def done(pool: BlockPool, tokens: Seq[int], *extra: int | str) -> list[int]:
    """Begin a prompt, compute it and let it go; the blocks that it had."""
    table = begun(pool, tokens, *extra)
    pool.commit(table, len(tokens))
    pool.free(table)
    return table.blocks


# ── any history ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Ridden:
    """A prompt under way: its true tokens, and how many of them have been computed."""

    tokens: list[int]
    extra: tuple[int | str, ...]
    table: BlockTable
    computed: int
    committed: int = 0  # blocks that have been told once: a duplicate stays one, even when the other is gone
    riding: bool = False

    def content(self, end: int) -> Content:
        return (self.extra, *self.tokens[:end])


@dataclass(eq=False)
class Launched:
    """A batch under way: (prompt, first and last token of its chunk), in order."""

    rows: list[tuple[Ridden, int, int]] = field(default_factory=list)


class AnyHistory(RuleBasedStateMachine):
    """Beside the pool run a memory with the true tokens in it, and the simplest model of who has which block."""

    BLOCKS, SIZE = 9, 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.BLOCKS, self.SIZE)
        self.memory: list[Content | None] = [None] * (self.BLOCKS * self.SIZE)
        self.free = list(range(self.BLOCKS))  # in the order in which they are taken
        self.known: dict[Content, int] = {}  # prefixes that are found, and the block that each ends with
        self.under_way: list[Ridden] = []
        self.launched: list[Launched] = []
        self.queried = self.hit = self.evicted = 0

    # ── the model ──

    def holders(self, block: int) -> int:
        return sum(ridden.table.blocks.count(block) for ridden in self.under_way)

    def promised(self) -> int:
        return sum(-(-len(r.tokens) // self.SIZE) - len(r.table.blocks) for r in self.under_way)

    def takes(self, count: int) -> list[int]:
        """The blocks that are next; their content is forgotten."""
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count
        for name, block in list(self.known.items()):
            if block in taken:
                del self.known[name]
                self.evicted += 1
        return taken

    def lookup(self, tokens: list[int], extra: tuple[int | str, ...], behind: Ridden | None) -> list[int]:
        """The blocks of the longest prefix that is known or, after that, in the table of `behind`."""
        found: list[int] = []
        in_cache = True
        for end in range(self.SIZE, len(tokens), self.SIZE):
            prefix = (extra, *tokens[:end])
            in_cache = in_cache and prefix in self.known
            if in_cache:
                found.append(self.known[prefix])
            elif behind is not None and end <= behind.table.upto and behind.content(end) == prefix:
                found.append(behind.table.blocks[end // self.SIZE - 1])
            else:
                break
        return found

    # ── what happens ──

    @rule(data=st.data(), num_old=st.integers(0, 2), num_new=st.integers(0, 4))
    def a_batch_is_dealt(self, data: st.DataObject, num_old: int, num_new: int) -> None:
        """Of chunks of prompts that wait for their next one, and of new prompts, that may ride behind any of them."""
        batch, prefixes = Launched(), Prefixes(self.SIZE)
        for ridden in [r for r in self.under_way if not r.riding and r.computed < len(r.tokens)][:num_old]:
            upto = data.draw(st.integers(ridden.computed + 1, len(ridden.tokens)), label="next chunk ends")
            expected = ridden.table.blocks + self.takes(-(-upto // self.SIZE) - len(ridden.table.blocks))
            self.pool.extend(ridden.table, upto)
            assert ridden.table.blocks == expected
            self._comes_aboard(batch, prefixes, ridden, ridden.computed, upto)
        for _ in range(num_new):
            tokens, extra, reuse = (
                data.draw(TOKENS),
                data.draw(EXTRA),
                data.draw(st.sampled_from([True, True, False])),
            )
            prompt = asked(tokens, self.SIZE, *extra, reuse=reuse)
            place = prefixes.find(prompt).behind
            behind = None if place is None else batch.rows[place][0]
            self._begins(data, batch, prefixes, (tokens, extra, prompt), behind)
        if batch.rows:
            self.launched.append(batch)

    def _begins(
        self,
        data: st.DataObject,
        batch: Launched,
        prefixes: Prefixes,
        new: tuple[list[int], tuple[int | str, ...], Prompt],
        behind: Ridden | None,
    ) -> None:
        tokens, extra, prompt = new
        table_behind = None if behind is None else behind.table
        found = self.lookup(tokens, extra, behind) if prompt.reuse else []
        past = len(found) * self.SIZE
        assert self.pool.match(prompt, table_behind) == past < len(tokens)
        revived = [block for block in found if not self.holders(block)]
        fits = -(-len(tokens) // self.SIZE) - len(found) + len(revived) <= len(self.free) - self.promised()
        upto = data.draw(st.integers(past + 1, len(tokens)), label="first chunk ends")
        table = self.pool.allocate(prompt, upto, table_behind)
        assert (table is not None) == fits
        if table is None:
            return
        self.free = [block for block in self.free if block not in revived]
        assert table.blocks == found + self.takes(-(-upto // self.SIZE) - len(found))
        assert (table.cached, table.upto) == (past, upto)
        if prompt.reuse and prompt.hashes:
            self.queried += len(tokens)
            self.hit += past
        ridden = Ridden(tokens, extra, table, past)
        self.under_way.append(ridden)
        self._comes_aboard(batch, prefixes, ridden, past, upto)

    def _comes_aboard(
        self, batch: Launched, prefixes: Prefixes, ridden: Ridden, start: int, upto: int
    ) -> None:
        prefixes.add(ridden.table.prompt, upto)
        batch.rows.append((ridden, start, upto))
        ridden.riding = True

    @precondition(lambda self: self.launched)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def a_batch_lands(self, data: st.DataObject, fails: bool) -> None:
        """In any order, so that a batch which is run again behind a later one is among what is tried."""
        batch = self.launched.pop(data.draw(st.integers(0, len(self.launched) - 1), label="batch"))
        if not fails:
            self._is_computed(batch)
        for ridden, _, upto in batch.rows:
            ridden.riding = False
            if fails:
                self._ends(ridden)
                continue
            self.pool.commit(ridden.table, upto)
            ridden.computed = upto
            told, ridden.committed = ridden.committed, upto // self.SIZE
            for place in range(told, upto // self.SIZE):
                self.known.setdefault(ridden.content((place + 1) * self.SIZE), ridden.table.blocks[place])
        for ridden, _, _ in batch.rows:
            if not fails and ridden.computed == len(ridden.tokens):
                self._ends(ridden)

    def _is_computed(self, batch: Launched) -> None:
        """All is written, then all is read: every token of every row sees its own prefix and nothing else."""
        written: set[int] = set()
        for ridden, start, upto in batch.rows:
            for token, slot in enumerate(self.pool.slots(ridden.table, start, upto), start):
                assert slot not in written, "two rows write into one place"
                written.add(slot)
                self.memory[slot] = ridden.content(token + 1)
        for ridden, _, upto in batch.rows:
            seen = [self.memory[slot] for slot in self.pool.slots(ridden.table, 0, upto)]
            assert seen == [ridden.content(token + 1) for token in range(upto)]

    def _ends(self, ridden: Ridden) -> None:
        blocks = list(ridden.table.blocks)
        self.pool.free(ridden.table)
        self.under_way.remove(ridden)
        for block in reversed(blocks):
            if not self.holders(block):
                found = block in self.known.values()
                self.free.insert(len(self.free) if found else 0, block)
        with pytest.raises(ValueError, match="freed"):
            self.pool.free(ridden.table)

    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        waiting = [ridden for ridden in self.under_way if not ridden.riding]
        if waiting:
            self._ends(data.draw(st.sampled_from(waiting)))

    # ── what holds ──

    @invariant()
    def nothing_leaks(self) -> None:
        used = set(chain.from_iterable(ridden.table.blocks for ridden in self.under_way))
        assert sorted([*self.free, *used]) == list(range(self.BLOCKS)), "each block is free or used"
        assert self.pool.num_used == len(used)
        assert self.pool.num_available == len(self.free) - self.promised() >= 0

    @invariant()
    def references_are_the_tables_that_have_the_block(self) -> None:
        assert self.pool._references == [self.holders(block) for block in range(self.BLOCKS)]

    @invariant()
    def what_is_found_is_what_it_stands_for(self) -> None:
        for prefix, block in self.known.items():
            last = block * self.SIZE + self.SIZE - 1
            assert self.memory[last] == prefix

    @invariant()
    def counts_are_exact(self) -> None:
        counted = self.pool.queried_tokens, self.pool.hit_tokens, self.pool.evicted_blocks
        assert counted == (self.queried, self.hit, self.evicted)
        assert len(self.pool._block_of) == len(self.known)

    def teardown(self) -> None:
        while self.launched:
            for ridden, _, _ in self.launched.pop().rows:
                ridden.riding = False
        for ridden in list(self.under_way):
            self._ends(ridden)
        self.nothing_leaks()
        assert self.pool.num_available == self.BLOCKS
        assert sorted(begun(self.pool, [7] * (self.BLOCKS * self.SIZE)).blocks) == list(range(self.BLOCKS))


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ── a scheduler of the simplest kind ─────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 6), TOKENS, st.none() | st.integers(0, 12)), max_size=20),
    budget=st.integers(1, 8),
    blocks=st.integers(7, 12),
)
def test_everybody_arrives(
    arrivals: list[tuple[int, list[int], int | None]], budget: int, blocks: int
) -> None:
    """First come, first served, in chunks, through a pool that hardly holds the longest: no step is without progress.

    `arrivals` are the step at which each comes, its tokens, and the step at which its client has had enough.
    """
    pool = BlockPool(blocks, 2)
    coming = deque(sorted(arrivals, key=lambda arrival: arrival[0]))
    waiting: deque[tuple[list[int], int | None]] = deque()
    under_way: list[tuple[BlockTable, int | None]] = []
    step = 0
    while coming or waiting or under_way:
        while coming and coming[0][0] <= step:
            waiting.append(coming.popleft()[1:])
        waiting = deque(one for one in waiting if one[1] is None or one[1] > step)
        for table, patience in list(under_way):
            if patience is not None and patience <= step:
                pool.free(table)
                under_way.remove((table, patience))
        room, rows, prefixes = budget, list[BlockTable](), Prefixes(2)
        for table, _ in under_way:
            if room:
                ahead = min(room, table.prompt.num_tokens - table.upto)
                room -= ahead
                pool.extend(table, table.upto + ahead)
                prefixes.add(table.prompt, table.upto)
                rows.append(table)
        while waiting and room:
            tokens, patience = waiting[0]
            prompt = asked(tokens, 2)
            place = prefixes.find(prompt).behind
            behind = None if place is None else rows[place]
            past = pool.match(prompt, behind)
            upto = min(len(tokens), past + room)
            begins = pool.allocate(prompt, upto, behind)
            if begins is None:
                break
            waiting.popleft()
            room -= upto - past
            prefixes.add(prompt, upto)
            rows.append(begins)
            under_way.append((begins, patience))
        assert rows or not (waiting or under_way), "somebody waits, and nobody rides"
        for table in rows:
            pool.commit(table, table.upto)
        for table, patience in list(under_way):
            if table.upto == table.prompt.num_tokens:
                pool.free(table)
                under_way.remove((table, patience))
        step += 1
    assert pool.num_available == blocks


# ── sharing ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ahead", ["in the cache", "in the batch"])
def test_the_last_token_is_always_computed(ahead: str) -> None:
    pool = BlockPool(8, 2)
    first = begun(pool, [1, 2, 3, 4])
    if ahead == "in the cache":
        pool.commit(first, 4)
    behind = first if ahead == "in the batch" else None
    assert pool.match(asked([1, 2, 3, 4], 2), behind) == 2
    assert pool.match(asked([1, 2, 3, 4, 5], 2), behind) == 4
    assert pool.match(asked([1, 2], 2), behind) == 0


def test_only_what_has_been_computed_is_found() -> None:
    pool = BlockPool(8, 2)
    table = begun(pool, [1, 2, 3, 4, 5, 6])
    probe = asked([1, 2, 3, 4, 5, 6, 7], 2)
    assert pool.match(probe) == 0
    pool.commit(table, 3)
    assert pool.match(probe) == 2, "a block that is half computed is not found"
    pool.commit(table, 6)
    assert pool.match(probe) == 6


def test_what_is_found_can_be_held_before_the_first_chunk_is_dealt() -> None:
    pool = BlockPool(3, 2)
    done(pool, [1, 2, 3, 4])
    table = pool.allocate(asked([1, 2, 3, 4, 5], 2), 0)
    assert table is not None
    assert (table.cached, table.upto, len(table.blocks)) == (4, 4, 2)
    assert pool.num_available == 0, "its third block is promised"
    assert len(pool.slots(table, 0, 4)) == 4


def test_what_failed_is_never_found() -> None:
    pool = BlockPool(8, 2)
    pool.free(begun(pool, [1, 2, 3, 4]))
    assert pool.match(asked([1, 2, 3, 4, 5], 2)) == 0


@pytest.mark.parametrize("extra", [(), (2, "a"), (1, "b")])
def test_adapters_and_salts_share_nothing(extra: tuple[int | str, ...]) -> None:
    pool = BlockPool(8, 2)
    table = begun(pool, [1, 2, 3, 4], 1, "a")
    assert pool.match(asked([1, 2, 3, 4], 2, *extra), table) == 0
    pool.commit(table, 4)
    assert pool.match(asked([1, 2, 3, 4], 2, *extra)) == 0
    assert pool.match(asked([1, 2, 3, 4], 2, 1, "a")) == 2


def test_who_wants_every_token_finds_nothing_and_is_found() -> None:
    pool = BlockPool(8, 2)
    done(pool, [1, 2, 3, 4])
    table = pool.allocate(asked([1, 2, 5, 6], 2, reuse=False), 4)
    assert table is not None
    assert table.cached == 0
    pool.commit(table, 4)
    assert pool.match(asked([1, 2, 5, 6, 7], 2)) == 4
    assert pool.queried_tokens == 4, "of the first alone: nobody looked for the second"


def test_a_prompt_without_hashes_is_never_found() -> None:
    pool = BlockPool(8, 2)
    table = pool.allocate(Prompt(4), 4)
    assert table is not None
    pool.commit(table, 4)
    assert pool.match(asked([0, 0, 0, 0, 0], 2)) == 0
    assert pool.queried_tokens == 0


def test_duplicates_serve_their_own_prompt_and_are_taken_first() -> None:
    pool = BlockPool(6, 2)
    first, second = begun(pool, [1, 2, 3]), begun(pool, [1, 2, 4])
    pool.commit(second, 3)
    pool.commit(first, 3)
    assert begun(pool, [1, 2, 5]).blocks[0] == second.blocks[0], (
        "the first to commit is the one that is found"
    )
    pool.free(first)
    pool.free(second)
    assert begun(pool, [9]).blocks[0] in first.blocks + second.blocks[1:]
    assert pool.evicted_blocks == 0


def test_a_batch_computes_a_common_prefix_once() -> None:
    pool = BlockPool(8, 2)
    first = begun(pool, [1, 2, 3, 4, 5])
    second = begun(pool, [1, 2, 3, 4, 6], behind=first)
    assert second.blocks[:2] == first.blocks[:2]
    assert second.cached == 4
    assert pool.num_used == 4
    pool.free(first)
    pool.commit(second, 5)
    assert pool.match(asked([1, 2, 3, 4, 7], 2)) == 4, (
        "it is found though the one that computed it was given up"
    )


def test_nobody_rides_on_what_this_batch_does_not_compute() -> None:
    pool = BlockPool(8, 2)
    first = pool.allocate(asked([1, 2, 3, 4, 5], 2), 3)
    assert first is not None
    assert pool.match(asked([1, 2, 3, 4, 6], 2), first) == 2


def test_what_is_committed_goes_before_what_rides() -> None:
    """A prefix begins in the cache and ends in the batch."""
    pool = BlockPool(8, 2)
    old = done(pool, [1, 2])
    first = pool.allocate(asked([1, 2, 3, 4, 5], 2, reuse=False), 5)
    second = begun(pool, [1, 2, 3, 4, 6], behind=first)
    assert first is not None
    assert second.blocks[:2] == [old[0], first.blocks[1]]
    assert (pool.num_used, pool.num_available) == (5, 3)


# ── pressure ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tail_of_a_prompt_goes_before_its_head() -> None:
    pool = BlockPool(3, 2)
    done(pool, [1, 2, 3, 4, 5, 6])
    done(pool, [9])
    assert pool.match(asked([1, 2, 3, 4, 5, 6], 2)) == 4
    done(pool, [8, 8, 8])
    assert pool.match(asked([1, 2, 3, 4, 5, 6], 2)) == 2


def test_what_was_used_longest_ago_goes_first() -> None:
    pool = BlockPool(3, 1)
    for token in (1, 2, 3):
        done(pool, [token])
    pool.free(begun(pool, [7, 8]))
    assert [pool.match(asked([token, 0], 1)) for token in (1, 2, 3)] == [0, 0, 1]
    assert pool.evicted_blocks == 2


def test_to_be_found_makes_young() -> None:
    pool = BlockPool(4, 1)
    for token in (1, 2, 3):
        done(pool, [token])
    pool.free(begun(pool, [1, 0]))  # finds the oldest, and takes the one block that has no content
    pool.free(begun(pool, [7, 8]))  # takes that one again, and of those with content the oldest
    assert [pool.match(asked([token, 0], 1)) for token in (1, 2, 3)] == [1, 0, 1]
    assert pool.evicted_blocks == 1


def test_a_block_in_use_is_never_taken() -> None:
    pool = BlockPool(3, 2)
    held = begun(pool, [1, 2, 3])
    pool.commit(held, 3)
    assert pool.allocate(asked([7, 8, 9], 2), 3) is None
    assert not set(begun(pool, [7]).blocks) & set(held.blocks)


def test_a_prompt_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(4, 2)
    done(pool, [1, 2, 3])
    held = begun(pool, [5, 5, 5, 5, 5])
    before = {name: str(value) for name, value in vars(pool).items()}
    assert pool.allocate(asked([1, 2, 3, 4, 5], 2), 3) is None, (
        "its first chunk would fit; the whole does not"
    )
    assert {name: str(value) for name, value in vars(pool).items()} == before
    pool.free(held)
    assert pool.allocate(asked([1, 2, 3, 4, 5], 2), 3) is not None


def test_a_found_block_that_was_free_is_a_block_less_for_others() -> None:
    pool = BlockPool(2, 2)
    done(pool, [1, 2])
    held = begun(pool, [5])
    assert pool.match(asked([1, 2, 3], 2)) == 2
    assert pool.allocate(asked([1, 2, 3], 2), 3) is None, (
        "one block is free, and it is the one that was found"
    )
    pool.free(held)
    assert pool.allocate(asked([1, 2, 3], 2), 3) is not None


def test_who_has_begun_is_never_kept_waiting() -> None:
    pool = BlockPool(4, 2)
    long = pool.allocate(asked([1] * 6, 2), 1)
    assert long is not None
    assert (pool.num_used, pool.num_available) == (1, 1)
    assert pool.allocate(asked([2] * 3, 2), 3) is None
    begun(pool, [3])
    pool.extend(long, 6)
    assert (len(long.blocks), pool.num_available) == (3, 0)


def test_who_leaves_early_gives_back_what_was_promised() -> None:
    pool = BlockPool(4, 2)
    table = pool.allocate(asked([1] * 8, 2), 1)
    assert table is not None
    pool.free(table)
    assert pool.num_available == 4


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_longer_than_the_cache_is_refused_and_does_not_wait() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(ValueError, match="5 tokens does not fit a cache of 4"):
        pool.allocate(Prompt(5), 1)


def test_hashes_of_another_block_size_are_refused() -> None:
    with pytest.raises(ValueError, match="4 hashes for 4 tokens in blocks of 2"):
        BlockPool(4, 2).match(asked([1, 2, 3, 4], 1))


@pytest.mark.parametrize("upto", [-1, 4])
def test_a_chunk_outside_the_prompt_is_refused(upto: int) -> None:
    pool = BlockPool(4, 2)
    with pytest.raises(ValueError, match=str(upto)):
        pool.allocate(Prompt(3), upto)
    table = begun(pool, [1, 2, 3])
    with pytest.raises(ValueError, match=str(upto)):
        pool.extend(table, upto)


def test_tokens_without_blocks_cannot_have_been_computed() -> None:
    pool = BlockPool(4, 2)
    table = pool.allocate(asked([1, 2, 3, 4], 2), 2)
    assert table is not None
    with pytest.raises(ValueError, match="4 tokens are said to be computed, and 2 have blocks"):
        pool.commit(table, 4)
    with pytest.raises(ValueError, match="tokens 0 to 4 of 2"):
        pool.slots(table, 0, 4)


@pytest.mark.parametrize("spent", [True, False])
def test_a_table_that_is_spent_or_of_another_pool_is_refused(spent: bool) -> None:
    pool = BlockPool(4, 2)
    owner = pool if spent else BlockPool(4, 2)
    table = begun(owner, [1, 2, 3])
    if spent:
        pool.free(table)
    uses: list[Callable[[], object]] = [
        lambda: pool.free(table),
        lambda: pool.extend(table, 3),
        lambda: pool.commit(table, 3),
        lambda: pool.slots(table, 0, 3),
        lambda: pool.match(asked([1, 2, 3], 2), table),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="freed, or is another pool's"):
            use()
    assert pool.num_available == 4


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_a_cache_that_holds_nothing_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="hold nothing"):
        BlockPool(*sizes)


def test_a_prompt_has_a_token() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Prompt(0)


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_slots_are_the_places_in_the_blocks(size: int, length: int, data: st.DataObject) -> None:
    pool = BlockPool(13, size)
    keep = begun(pool, [5] * data.draw(st.integers(1, size)))
    table = begun(pool, [1] * length)
    pool.free(keep)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    assert pool.slots(table, start, stop) == [
        table.blocks[token // size] * size + token % size for token in range(start, stop)
    ]


def test_a_shorter_chunk_takes_nothing_back() -> None:
    pool = BlockPool(4, 2)
    table = begun(pool, [1, 2, 3])
    pool.extend(table, 1)
    pool.commit(table, 2)
    pool.commit(table, 0)
    assert (len(table.blocks), table.upto, table.committed) == (2, 3, 1)
