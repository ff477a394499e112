"""Blocks: which of the cache's blocks hold which prompt's keys and values, and which are found again by later prompts.

Tokens are counted from the beginning of a prompt, blocks in blocks; a block (a page, to the kernels) holds `block_size`
tokens of one prefix. Nothing here touches the keys and values themselves.

A pooling model generates nothing, so how long a prompt gets is known when it begins. Its table is then promised all the
blocks that it will need: it takes them chunk by chunk and never waits half-way. Hence no deadlock, no preemption, and
no copy on write: only full blocks are shared, and nobody writes into those.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the cache needs to know of a prompt.

    `hashes` are `block_hashes` of its ids, or () for a prompt that shares nothing. `reuse` is False where the hidden
    state of every token is wanted: it computes them all, and others may still use what it computed.
    """

    num_tokens: int
    hashes: Seq[bytes] = ()
    reuse: bool = True

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError("a prompt has at least one token")

    def shareable(self, block_size: int) -> int:
        """Blocks that it may take from others, at most: its last token is always its own to compute."""
        return min((self.num_tokens - 1) // block_size, len(self.hashes)) if self.reuse else 0


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of a prompt under way, in order; BlockPool alone writes here.

    `cached` tokens at its beginning were found and are not computed for it. `blocks` hold its tokens up to `upto`: with
    the chunk under way or about to be, they are all computed. The first `committed` blocks can be found by others.
    """

    prompt: Prompt
    blocks: list[int]
    cached: int
    upto: int = 0
    committed: int = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens.

    What a batch under way reads or writes is its own until it has landed: a prompt rides in one batch at a time, and is
    committed or freed between two. So what is found was computed, and no batch writes over what another reads, even if
    one fails or is run again.

    A free block keeps its content, and is found by its hash, until it is taken. First those are taken whose content
    has no hash; then the one that was in use longest ago, and of one prompt the tail before the head.

    `queried_tokens` are those of prompts that were looked up when they began, `hit_tokens` those that were found, and
    `evicted_blocks` are the blocks whose content was given up for another's.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens hold nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.evicted_blocks = 0
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # The first is taken first; found blocks leave from anywhere. A dict as a deque would crawl over its graves.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._promised = 0  # blocks that tables under way have yet to take
        self._tables: set[BlockTable] = set()

    @property
    def num_available(self) -> int:
        """Blocks that a new prompt may have: free, and promised to nobody."""
        return len(self._free) - self._promised

    @property
    def num_used(self) -> int:
        """Blocks that hold a prompt under way."""
        return self.num_blocks - len(self._free)

    def match(self, prompt: Prompt, behind: BlockTable | None = None) -> int:
        """Tokens at the prompt's beginning that `allocate` would find now, always fewer than it has."""
        return len(self._find(prompt, behind)) * self.block_size

    def allocate(self, prompt: Prompt, upto: int, behind: BlockTable | None = None) -> BlockTable | None:
        """Begin a prompt: its longest known prefix and blocks for its tokens up to `upto`; the rest is promised.

        `behind` is a table of the very batch that the prompt is to ride in, which computes its tokens up to its `upto`:
        blocks are shared with it that are not committed yet, for every layer writes all keys and values of a batch
        before it reads any. Should the one not be computed, the other must not be used either.

        None, and nothing has changed, while too few blocks are available. A prompt that is longer than the whole cache
        is a ValueError: to wait for it would be to wait for ever.
        """
        self._check_chunk(prompt, upto)
        found = self._find(prompt, behind)
        if self._cost(prompt, found) > self.num_available:
            return None
        for block in found:
            self._references[block] += 1
            self._free.pop(block, None)
        table = BlockTable(prompt, found, len(found) * self.block_size)
        self._tables.add(table)
        self._promised += self._blocks(prompt.num_tokens) - len(found)
        self._take(table, max(upto, table.cached))
        if prompt.reuse and prompt.hashes:
            self.queried_tokens += prompt.num_tokens
            self.hit_tokens += table.cached
        return table

    def extend(self, table: BlockTable, upto: int) -> None:
        """Take blocks for the prompt's tokens up to `upto`, of those that it was promised: its next chunk."""
        self._require(table)
        self._check_chunk(table.prompt, upto)
        self._take(table, max(upto, table.upto))

    def commit(self, table: BlockTable, upto: int) -> None:
        """The prompt's tokens up to `upto` have been computed: from now on their full blocks are found.

        Where another has computed the same meanwhile, the first to commit stays the one that is found; the duplicate
        serves its own prompt, and is the first to be taken after it.
        """
        self._require(table)
        if upto > table.upto:
            raise ValueError(f"{upto} tokens are said to be computed, and {table.upto} have blocks")
        full = min(upto // self.block_size, len(table.prompt.hashes))
        for place in range(table.committed, full):
            block, name = table.blocks[place], table.prompt.hashes[place]
            if self._block_of.setdefault(name, block) == block:
                self._hash_of[block] = name
        table.committed = max(table.committed, full)

    def free(self, table: BlockTable) -> None:
        """The prompt is done, or was given up: drop its references and what it was promised. The table is spent."""
        self._require(table)
        self._tables.remove(table)
        self._promised -= self._blocks(table.prompt.num_tokens) - len(table.blocks)
        for block in reversed(table.blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=self._hash_of[block] is not None)

    def forget(self) -> None:
        """Nothing that has been computed is found any more, nor what prompts under way go on to compute."""
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        for table in self._tables:
            table.committed = len(table.prompt.hashes)

    def slots(self, table: BlockTable, start: int, stop: int) -> list[int]:
        """Where the prompt's tokens from `start` to before `stop` are kept: block * block_size + place."""
        self._require(table)
        if not 0 <= start <= stop <= table.upto:
            raise ValueError(f"tokens {start} to {stop} of {table.upto} that have blocks")
        size = self.block_size
        first = start // size * size
        blocks = table.blocks[start // size : self._blocks(stop)]
        whole = [slot for block in blocks for slot in range(block * size, block * size + size)]
        return whole[start - first : stop - first]

    def _find(self, prompt: Prompt, behind: BlockTable | None) -> list[int]:
        """The blocks of the longest known prefix: what is committed, and where that ends what `behind` goes on with."""
        self._check(prompt)
        shareable = prompt.shareable(self.block_size)
        found: list[int] = []
        for name in prompt.hashes[:shareable]:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        if behind is not None:
            self._require(behind)
            common = min(shareable, len(behind.prompt.hashes), behind.upto // self.block_size)
            for place in range(len(found), common):
                if prompt.hashes[place] != behind.prompt.hashes[place]:
                    break
                found.append(behind.blocks[place])
        return found

    def _cost(self, prompt: Prompt, found: list[int]) -> int:
        """Blocks, of those available, that the prompt needs in all: found ones too, where they are free until now."""
        return self._blocks(prompt.num_tokens) - sum(self._references[block] > 0 for block in found)

    def _take(self, table: BlockTable, upto: int) -> None:
        """Give the table blocks up to `upto`, out of what it was promised."""
        missing = self._blocks(upto) - len(table.blocks)
        self._promised -= missing
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            name = self._hash_of[block]
            if name is not None:
                del self._block_of[name]
                self._hash_of[block] = None
                self.evicted_blocks += 1
            self._references[block] = 1
            table.blocks.append(block)
        table.upto = upto

    def _blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one prompt."""
        return -(-tokens // self.block_size)

    def _check(self, prompt: Prompt) -> None:
        """Refuse what could only wait for ever, and hashes that were made for blocks of another size."""
        if self._blocks(prompt.num_tokens) > self.num_blocks:
            raise ValueError(
                f"a prompt of {prompt.num_tokens} tokens does not fit a cache of {self.num_blocks * self.block_size}"
            )
        if prompt.hashes and len(prompt.hashes) != prompt.num_tokens // self.block_size:
            raise ValueError(
                f"{len(prompt.hashes)} hashes for {prompt.num_tokens} tokens in blocks of {self.block_size}"
            )

    def _check_chunk(self, prompt: Prompt, upto: int) -> None:
        if not 0 <= upto <= prompt.num_tokens:
            raise ValueError(f"a chunk ends at {upto} in a prompt of {prompt.num_tokens} tokens")

    def _require(self, table: BlockTable) -> None:
        if table not in self._tables:
            raise ValueError("this table has been freed, or is another pool's")
