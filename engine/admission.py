"""Admission: which requests may join those that wait. Pure: what was measured is told, and nothing is timed here.

The measure is time. A request that would wait long is better refused while its sender can still go elsewhere, and how
long it would wait follows from what waits already and how fast the engine runs. Since turns go round, others' tokens
are ahead of a newcomer only as far as their requests' first turns go; so a request of many texts makes nobody wait
longer than one that fills a batch, and counts as one of those. It waits for all that is there itself, and is refused by
that.
"""

from __future__ import annotations

from carpool.engine.errors import Draining, EngineDead, NotReady, Overloaded
from carpool.engine.stats import State

TURN_SECONDS = 5.0  # until a newcomer's turn has come: half of what impatient clients wait
FEW_REQUESTS = 128  # may wait longer: so many connections, each with one request, are no overload
QUEUE_SECONDS = 60.0  # until a newcomer is through, at most
_MEMORY_S = 10.0  # a worker's seconds by which what was measured before has lost most of its weight


def admit(state: State) -> None:
    """Raise unless an engine in this state runs requests. While it drains it does: those were let in before."""
    if state in ("ready", "draining"):
        return
    if state == "starting":
        raise NotReady("The model is still loading.", retry_after=5)
    if state == "dead":
        raise EngineDead("The engine has failed and is about to restart.", retry_after=10)
    raise Draining("The server is shutting down.", retry_after=10)


class Admission:
    """`tokens_per_second` is what all workers run together; `batch_tokens` are the most that count of a request.

    With `max_queued_tokens` that bound alone holds, in place of those in seconds.
    """

    def __init__(self, max_queued_tokens: int | None, batch_tokens: int, workers: int) -> None:
        self.tokens_per_second = 0.0
        self._most = max_queued_tokens
        self._batch_tokens = batch_tokens
        self._workers = workers
        self._requests = 0
        self._first_turns = 0  # tokens

    def measured(self, tokens: int, seconds: float) -> None:
        """One worker ran a batch while more waited, so it is as fast as can be. The more seconds, the more it says."""
        if seconds > 0.0:
            rate = self._workers * tokens / seconds
            weight = min(1.0, seconds / _MEMORY_S) if self.tokens_per_second else 1.0
            self.tokens_per_second += weight * (rate - self.tokens_per_second)

    def check(self, tokens: int, waiting_tokens: int) -> None:
        """Raise Overloaded if so many are not to join. When nothing waits, no size is too large."""
        if not tokens or not waiting_tokens:
            return
        rate = max(self.tokens_per_second, 1.0)
        if self._most is not None:
            full = waiting_tokens + tokens > self._most
        else:
            ahead = min(self._first_turns, waiting_tokens)  # twins wait for nothing of their own
            turns = ahead + min(tokens, self._batch_tokens)
            crowded = self._requests >= FEW_REQUESTS and turns > TURN_SECONDS * rate
            through = turns if tokens <= self._batch_tokens else waiting_tokens + tokens
            full = crowded or through > QUEUE_SECONDS * rate
        if full:
            seconds = waiting_tokens / rate
            raise Overloaded(
                f"The queue is full: {waiting_tokens} tokens wait, {seconds:.1f} s of work.",
                retry_after=max(1.0, seconds / 2),
            )

    def enter(self, tokens: int) -> None:
        """A request of so many tokens was taken in."""
        self._requests += 1
        self._first_turns += min(tokens, self._batch_tokens)

    def leave(self, tokens: int) -> None:
        """It has ended, in whichever way."""
        self._requests -= 1
        self._first_turns -= min(tokens, self._batch_tokens)
