"""What the engine tells the world about itself while it runs."""

from dataclasses import dataclass
from typing import Literal, Protocol

State = Literal["starting", "ready", "draining", "dead", "stopped"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The cache of keys and values, since the start: tokens of prompts that were looked up, and of those that were
    found; and now: blocks that there are, and that hold a prompt under way."""

    queried_tokens: int
    hit_tokens: int
    num_blocks: int
    used_blocks: int


@dataclass(frozen=True, slots=True)
class ResultStats:
    """The cache of results, since the start: rows that were looked up and found, and those that were not; and now: the
    bytes that it takes, and may take."""

    hits: int
    misses: int
    num_bytes: int
    max_bytes: int


class Observer(Protocol):
    """Called as things happen, on the engine's event loop; implementations must be quick and must not raise."""

    def batch_done(self, tokens: int, sequences: int, forward_seconds: float) -> None:
        """One forward pass is over, pooled and copied back."""

    def sequences_cancelled(self, count: int) -> None:
        """So many waiting sequences vanished: their client left, or their deadline passed."""


class Unobserved:
    """The observer of an engine that nobody watches."""

    def batch_done(self, tokens: int, sequences: int, forward_seconds: float) -> None:
        """Nobody asked."""

    def sequences_cancelled(self, count: int) -> None:
        """Nobody asked."""
