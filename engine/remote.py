"""RemoteCore: what a front has in place of a core. It runs nothing; the engine's process does, at the other end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from carpool.engine import parcel
from carpool.engine.admission import admit
from carpool.engine.changes import Change, written
from carpool.engine.errors import EngineDead, NotReady
from carpool.engine.frames import (
    Adapters,
    Answer,
    AnyFrame,
    Cancel,
    Failed,
    Leave,
    Parcel,
    Progress,
    Standing,
    answered,
    asking,
    failed,
)
from carpool.engine.line import Line
from carpool.engine.stats import CacheStats, Observer, ResultStats, State, Unobserved

if TYPE_CHECKING:
    from carpool.engine.outputs import PoolingResult
    from carpool.engine.preparation import Known
    from carpool.engine.prepared import Prepared
    from carpool.engine.request import Request

_UNTOLD = Standing("starting", 0, 0, 0.0, None)


@dataclass(slots=True, eq=False)
class _Pending:
    """One request that was sent and not yet answered."""

    future: asyncio.Future[PoolingResult]
    token_ids: list[list[int]]
    on_progress: Callable[[int], object] | None


class RemoteCore:
    """The face of `Core`, over a socket. What it says of the queue is what the engine said last."""

    cache_stats: CacheStats | None = None  # the engine's process counts these, and shows them
    result_stats: ResultStats | None = None

    def __init__(
        self,
        connection: socket.socket,
        reply: Callable[[str], Awaitable[bytes]],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        """`reply` answers what the engine's process asks."""
        self.observer: Observer = Unobserved()  # of batches and the queue, which are not here
        self.parts: Known | None = None
        self._connection = connection
        self._reply = reply
        self._trust_remote_code = trust_remote_code
        self._line: Line | None = None
        self._standing = _UNTOLD
        self._dead = asyncio.Event()
        self._parcel: asyncio.Future[bytes] | None = None
        self._over = asyncio.Event()
        self._pending: dict[int, _Pending] = {}
        self._next_number = 0
        self._adapters: Adapters | None = None  # since the parcel was packed

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Wait until the engine has loaded; raises EngineDead if it goes away before."""
        loop = asyncio.get_running_loop()
        self._parcel = loop.create_future()
        self._line = await Line.open(self._connection, self)
        unpack = partial(parcel.unpack, await self._parcel, trust_remote_code=self._trust_remote_code)
        self.parts = await loop.run_in_executor(None, unpack)
        self._take_adapters()

    async def over(self) -> None:
        """Returns when the engine's process wants this one to end, or is gone."""
        await self._over.wait()

    async def died(self) -> None:
        """Returns when the engine is dead."""
        await self._dead.wait()

    def drain(self) -> None:
        """When to is for the engine's process to say."""

    async def stop(self, timeout: float) -> bool:
        """Hang up. True if all that was asked is answered."""
        finished = not self._pending
        if self._line is not None:
            self._line.close()
            await self._line.closed()
        return finished

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> State:
        if self._dead.is_set():
            return "dead"
        return "starting" if self.parts is None else self._standing.state

    @property
    def waiting_tokens(self) -> int:
        return self._standing.waiting_tokens

    @property
    def waiting_sequences(self) -> int:
        return self._standing.waiting_sequences

    @property
    def tokens_per_second(self) -> float:
        return self._standing.tokens_per_second

    async def ask(self, question: str) -> bytes:
        """The engine's process, about itself and all fronts."""
        if self._line is None:
            raise NotReady("The engine's process is still starting.")
        return await self._line.ask(question)

    async def change(self, change: Change) -> None:
        """As `Core.change`; this front and all others know of it then."""
        await self.ask(written(change))

    def _take_adapters(self) -> None:
        if self.parts is not None and (known := self._adapters) is not None:
            model = replace(self.parts.model, adapters=known.slots, lora_modules=known.modules)
            self.parts = self.parts.of(model)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Raise Overloaded if, by its last word, the engine would refuse even the shortest prompt."""
        self._standing.check()

    async def run(
        self,
        request: Request,
        ready: Prepared,
        timeout: float | None,
        on_progress: Callable[[int], object] | None = None,
    ) -> PoolingResult:
        """As `Core.run`."""
        admit(self.state)
        assert self._line is not None
        number = self._next_number
        self._next_number += 1
        future: asyncio.Future[PoolingResult] = asyncio.get_running_loop().create_future()
        self._pending[number] = _Pending(future, ready.token_ids, on_progress)
        self._line.send(*asking(number, request, ready, timeout, progress=on_progress is not None))
        try:
            return await future
        finally:
            if self._pending.pop(number, None):  # the caller was cancelled
                self._line.send(Cancel(number))

    # ── what the engine's process says ───────────────────────────────────────────────────────────────────

    def received(self, frame: AnyFrame, body: bytes) -> None:
        match frame:
            case Answer():
                if pending := self._taken(frame.number):
                    pending.future.set_result(answered(frame, body, pending.token_ids))
            case Failed():
                if pending := self._taken(frame.number):
                    pending.future.set_exception(failed(frame))
            case Progress():
                if (waiting := self._pending.get(frame.number)) and waiting.on_progress:
                    waiting.on_progress(frame.rows)
            case Standing():
                self._standing = frame
                if frame.state == "dead":
                    self._dead.set()
            case Adapters():
                self._adapters = frame
                self._take_adapters()
            case Parcel():
                assert self._parcel is not None
                self._parcel.set_result(body)
            case Leave():
                self._over.set()

    def hung_up(self) -> None:
        """Nothing that is pending will be answered any more."""
        self._dead.set()
        self._over.set()
        for number in list(self._pending):
            if pending := self._taken(number):
                pending.future.set_exception(_dead())
        if self._parcel is not None and not self._parcel.done():
            self._parcel.set_exception(_dead())

    async def reply(self, question: str) -> bytes:
        return await self._reply(question)

    def _taken(self, number: int) -> _Pending | None:
        """The request, which ends now; None if its caller has left, which the engine did not know yet."""
        pending = self._pending.pop(number, None)
        return pending if pending and not pending.future.done() else None


def _dead() -> EngineDead:
    return EngineDead("The engine's process is gone.", retry_after=10)
