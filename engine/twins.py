"""Twins: sequences of one result, of which one is run for all. Pure; the scheduler's, which moves them.

Each waits in a place of its own, by its own priority, share and deadline. The first to be dealt leads, and the others
rest until it has landed; so none waits longer than it would by itself, and none needs the others to stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from carpool.engine.sequence import Sequence


@dataclass(slots=True)
class _Ride:
    """A lead on its way, and those that rest. Whether its result `lands` with the batch that was dealt last."""

    lead: Sequence
    lands: bool = True
    resting: dict[Sequence, None] = field(default_factory=dict)


class Twins:
    """Sequences by `key`; those without one have no twins."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, dict[Sequence, None]] = {}
        self._rides: dict[bytes, _Ride] = {}
        self._resting: dict[int, dict[Sequence, None]] = {}  # by request

    def rests(self, seq: Sequence) -> bool:
        """Take in one that is about to wait: True if it rests instead, since its twin is on its way.

        Not behind one of lower priority that has chunks to come: then it is run by itself, and nobody's twin.
        """
        ride = self._rides.get(seq.key)
        if not seq.key or (ride is not None and ride.lead is seq):
            return False
        if ride is None:
            self._waiting.setdefault(seq.key, {})[seq] = None
            return False
        if not ride.lands and seq.priority < ride.lead.priority:
            seq.key = b""
            return False
        self._rest(ride, seq)
        return True

    def leads(self, seq: Sequence, lands: bool) -> list[Sequence]:
        """It was dealt: its twins rest from now on, and are to wait no more."""
        if not seq.key:
            return []
        ride = self._rides.get(seq.key)
        if ride is None:
            ride = self._rides[seq.key] = _Ride(seq)
        ride.lands = lands
        twins = self._waiting.pop(seq.key, {})
        twins.pop(seq, None)
        for twin in twins:
            self._rest(ride, twin)
        return list(twins)

    def forget(self, seq: Sequence) -> None:
        """It waits no more, without having been dealt."""
        twins = self._waiting.get(seq.key)
        if twins is not None:
            twins.pop(seq, None)
            if not twins:
                del self._waiting[seq.key]

    def forget_resting(self, request_id: int) -> int:
        """The request has ended; returns how many of its sequences rested."""
        gone = self._resting.pop(request_id, {})
        for seq in gone:
            del self._rides[seq.key].resting[seq]
        return len(gone)

    def take(self, lead: Sequence) -> list[Sequence]:
        """Its way has ended: those that rested for its sake."""
        ride = self._rides.get(lead.key)
        if ride is None or ride.lead is not lead:
            return []
        del self._rides[lead.key]
        for seq in ride.resting:
            own = self._resting[seq.request_id]
            del own[seq]
            if not own:
                del self._resting[seq.request_id]
        return list(ride.resting)

    def _rest(self, ride: _Ride, seq: Sequence) -> None:
        ride.resting[seq] = None
        self._resting.setdefault(seq.request_id, {})[seq] = None
