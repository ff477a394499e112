"""FairQueue: who waits, and whose turn it is. Pure.

Priority first; then the client that was served the fewest tokens; then that client's request that was served the
fewest; then order of arrival.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable
from itertools import count

from carpool.engine.sequence import Sequence

_FEW_CLIENTS = 64  # idle clients that are not worth a look at whether they may be forgotten


class _Flow:
    """A queue that gives each of its children the same number of tokens; a leaf deals sequences in order.

    `served` is the flow's virtual time: tokens dealt from it so far. The least served child goes first, and one
    that joins starts level with the least served of those that wait, so none can save up turns or owe them
    (start-time fair queueing, Goyal et al., 1996).
    """

    __slots__ = ("_children", "num_waiting", "order", "parent", "served", "waiting")

    def __init__(self, parent: _Flow | None, order: int) -> None:
        self.parent = parent
        self.order = order
        self.served = 0
        self.num_waiting = 0
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()  # as a queue, of which any may be taken out
        # A heap whose stale entries (the child was dealt from since, or has nothing left) are dropped when met.
        self._children: list[tuple[int, int, _Flow]] = []

    def least_served(self) -> _Flow | None:
        """The child whose turn it is, or None if none waits."""
        while self._children:
            served, _, child = self._children[0]
            if served == child.served and child.num_waiting:
                return child
            heapq.heappop(self._children)
        return None

    def join(self, child: _Flow) -> None:
        """Start `child` level with the least served; called when it goes from nothing waiting to something."""
        least = self.least_served()
        if least is not None:
            child.served = max(child.served, least.served)

    def dealt(self, tokens: int, sequences: int) -> None:
        """Record that sequences left this leaf (or, with negative numbers, came back), all the way up."""
        flow: _Flow | None = self
        while flow is not None:
            flow.served += tokens
            flow.num_waiting -= sequences
            moved = tokens != 0 or flow.num_waiting == -sequences  # else its entry in the heap still holds
            if flow.parent is not None and flow.num_waiting and moved:
                heapq.heappush(flow.parent._children, (flow.served, flow.order, flow))
            flow = flow.parent


class FairQueue:
    """Sequences that wait, and what their clients and requests were charged.

    `num_tokens` are those still to be run of all that wait. Whoever takes sequences out for good tells `settle`.
    """

    def __init__(self) -> None:
        self.num_sequences = 0
        self.num_tokens = 0
        # One that waits all by itself has nobody to be fair to: it is filed once another comes.
        self._lone: Sequence | None = None
        self._many_clients = _FEW_CLIENTS
        self._arrivals = count()
        self._priorities: list[int] = []  # sorted; those with a class below
        self._classes: dict[int, _Flow] = {}
        self._clients: dict[int, dict[str, _Flow]] = {}  # by priority
        self._requests: dict[int, _Flow] = {}

    def add(self, seq: Sequence, *, first: bool = False) -> None:
        """Behind the rest of its request, or before it. The sequences of a request share its priority."""
        self.num_tokens += seq.remaining
        self.num_sequences += 1
        if self.num_sequences == 1 and not self._priorities:
            self._lone = seq
            return
        if self._lone is not None:
            self._file(self._lone, first=False, charged=0)
            self._lone = None
        self._file(seq, first, charged=0)

    def first(self) -> Sequence:
        """The one whose turn it is. Something must wait."""
        if self._lone is not None:
            return self._lone
        flow: _Flow | None = next(
            level for priority in self._priorities if (level := self._classes[priority]).num_waiting
        )
        while flow is not None and not flow.waiting:
            flow = flow.least_served()
        assert flow is not None, "a class that counts waiting sequences has a request that holds one"
        return next(iter(flow.waiting))

    def remove(self, seq: Sequence, charged: int = 0) -> None:
        """Take one out, wherever it stands; its client and its request are charged so many tokens."""
        self.num_tokens -= seq.remaining
        self.num_sequences -= 1
        if seq is self._lone:
            self._lone = None
            return
        request = self._requests[seq.request_id]
        del request.waiting[seq]
        request.dealt(charged, 1)

    def put_back(self, seq: Sequence) -> None:
        """Undo that the first was removed and charged for all of it. In reverse order, every queue is as it was."""
        if seq.request_id not in self._requests:  # it was alone
            self.add(seq)
            return
        self.num_tokens += seq.remaining
        self.num_sequences += 1
        self._file(seq, first=True, charged=-seq.remaining)

    def charge(self, seq: Sequence, tokens: int) -> None:
        """For one that was removed, and is not settled: so many tokens more, or fewer."""
        if (request := self._requests.get(seq.request_id)) is not None:
            request.dealt(tokens, 0)

    def drop(self, request_id: int) -> list[Sequence]:
        """Take out all of a request. Nobody is charged."""
        if self._lone is not None and self._lone.request_id == request_id:
            gone = [self._lone]
            self._lone = None
        elif (request := self._requests.pop(request_id, None)) is not None:
            gone = list(request.waiting)
            request.waiting.clear()
            request.dealt(0, len(gone))
        else:
            return []
        self.num_tokens -= sum(seq.remaining for seq in gone)
        self.num_sequences -= len(gone)
        return gone

    def settle(self, gone: Iterable[Sequence] = ()) -> None:
        """These will not be put back. What they leave empty is forgotten.

        Once nothing of a priority waits, nobody's past counts: its clients start afresh, whoever comes first.
        """
        if not self._priorities:
            return
        for seq in gone:
            request = self._requests.get(seq.request_id)
            if request is not None and not request.num_waiting:
                del self._requests[seq.request_id]
        for priority in [p for p in self._priorities if not self._classes[p].num_waiting]:
            self._priorities.remove(priority)
            del self._classes[priority], self._clients[priority]

    def _file(self, seq: Sequence, first: bool, charged: int) -> None:
        request = self._requests.get(seq.request_id) or self._open(seq)
        request.waiting[seq] = None
        if first:
            request.waiting.move_to_end(seq, last=False)
        request.dealt(charged, -1)

    def _open(self, seq: Sequence) -> _Flow:
        """Make the request's flow, below its client's, below its priority's."""
        level = self._classes.get(seq.priority)
        if level is None:
            level = self._classes[seq.priority] = _Flow(None, next(self._arrivals))
            self._clients[seq.priority] = {}
            insort(self._priorities, seq.priority)
        clients = self._clients[seq.priority]
        client = clients.get(seq.client)
        if client is None:
            self._forget_clients(level, clients)
            client = clients[seq.client] = _Flow(level, next(self._arrivals))
        if not client.num_waiting:
            level.join(client)
        request = self._requests[seq.request_id] = _Flow(client, next(self._arrivals))
        client.join(request)
        return request

    def _forget_clients(self, level: _Flow, clients: dict[str, _Flow]) -> None:
        """Now and then, drop the idle clients that others have caught up with: they would start level anyway."""
        least = level.least_served()
        if least is None or len(clients) < self._many_clients:
            return
        for name, flow in list(clients.items()):
            if not flow.num_waiting and flow.served <= least.served:
                del clients[name]
        self._many_clients = max(_FEW_CLIENTS, 2 * len(clients))
