"""Sequence: one row of work, from admission to its output."""

from dataclasses import dataclass
from typing import Any

from carpool.engine.cache.blocks import BlockTable, Prompt
from carpool.engine.params import PoolingParams, Task


@dataclass(slots=True, eq=False)
class Sequence:
    """The token ids of one prompt and what the scheduler needs to know about them.

    Times are seconds on the caller's monotonic clock. `request_id` groups the sequences of one call and is
    unique among live requests; `index` is the place in that call.
    """

    request_id: int
    index: int
    token_ids: list[int]
    params: PoolingParams
    task: Task = "embed"
    arrival: float = 0.0
    deadline: float | None = None
    priority: int = 0  # lower runs first
    client: str = ""  # whose share it is charged to
    overtaken_at: float | None = None  # set by the scheduler: when a later one first rode ahead of it
    type_start: int | None = None  # of a pair: where its second text, of token type 1, begins
    adapter: int = 0  # which adapter it rides on, counted from 1; 0 is the model as it stands
    unseen: int | None = None  # from here on its tokens look and are not looked at (a query's expansion)

    skip: int = 0  # tokens at its beginning that are not pooled: a prompt before the text
    key: bytes = b""  # sequences of one key have one result, and one of them is run; b"" has no twins

    # What the cache is told of it, None to be run whole and by itself; and, written by the scheduler alone, where its
    # keys and values are kept, how many tokens of it need not be run any more, and how many of them others had run.
    prompt: Prompt | None = None
    table: BlockTable | None = None
    computed: int = 0
    cached: int = 0
    alone: bool = False  # it was in a batch that failed, and shares no other
    carried: Any = None  # what the runner has of it so far, and nobody else looks at

    @property
    def work(self) -> tuple[object, ...]:
        """All that its hidden states depend on: of sequences of equal work in one batch, one is run."""
        whole = tuple(self.token_ids), self.type_start, self.adapter, self.unseen
        return whole if self.table is None else (*whole, id(self.table))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Tokens that are still to be run."""
        return len(self.token_ids) - self.computed
