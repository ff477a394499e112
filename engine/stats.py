"""What the engine tells the world about itself while it runs."""

from typing import Protocol


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
