"""Fronts: the processes that do HTTP, kept alive and asked by the one that runs the engine (`--api-workers`).

this process: engine, sockets that listen ── a socketpair each ── N × `front.py`: HTTP, tokenizing, encoding
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import structlog

from carpool.engine import changes, parcel
from carpool.engine.errors import EngineError
from carpool.engine.gate import Gate
from carpool.server import doors
from carpool.server.counts import Counts
from carpool.server.http import FLUSH_SECONDS, LINGER_SECONDS
from carpool.server.metrics import Metrics

if TYPE_CHECKING:
    from carpool.engine.async_engine import AsyncEngine
    from carpool.server.config import ServerConfig

log = structlog.get_logger()

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0  # before one that died is started again: twice as long each time
SETTLED_S = 60.0  # one that lived so long had no fault that the next will have
COUNT_SECONDS = 1.0  # a front that has not said by then what it counted is shown with what it said last
# What to import from, and then what to do, come by standard input: no argument and no variable shows a key to others.
# Signals reach all of a group, and it is this process that says when to end: first of all, imports take a second.
_START = """\
import signal
for known in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(known, signal.SIG_IGN)
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from carpool.server.front import main
main()
"""


class Fronts:
    """`config.api_workers` processes over the same sockets."""

    def __init__(self, config: ServerConfig, engine: AsyncEngine, sockets: Sequence[socket.socket]) -> None:
        self.url = doors.url(config, sockets)
        self._config = config
        self._engine = engine
        self._sockets = sockets
        self._metrics = Metrics(config.model_names[0], engine)
        engine.observer = self._metrics
        self._started_at = int(time.time())
        self._parcel: bytes | None = None
        self._gates: set[Gate] = set()
        self._counted: dict[Gate, Counts] = {}  # what each said last
        self._departed = Counts()  # what those said last that have died: a counter never falls
        self._leaving = False
        self._keepers: list[asyncio.Task[None]] = []
        self._greeters: set[asyncio.Task[None]] = set()
        self._serving = asyncio.Event()  # one of them has said that it does

    def start(self) -> None:
        self._keepers = [
            asyncio.ensure_future(self._keep(number)) for number in range(self._config.api_workers)
        ]

    async def ready(self) -> None:
        """Hand out what was loaded, and wait until those who got it serve or are lost, and at least one serves."""
        assert self._engine.core.parts is not None, "the engine has started"
        self._parcel = parcel.pack(self._engine.core.parts)
        await asyncio.gather(*(self._greet(gate, self._parcel) for gate in self._gates))
        await self._serving.wait()

    async def inside(self) -> int:
        """Requests that are under way in any of them. All know by then how the engine is."""
        for gate in self._gates:
            gate.tell()
        return sum(counts.inside for counts in await self._counts())

    async def stop(self) -> None:
        """Have them send what is left to send, and end; those that do not are killed."""
        self._leaving = True
        for gate in self._gates:
            gate.leave()
        _, stuck = await asyncio.wait(self._keepers, timeout=FLUSH_SECONDS + LINGER_SECONDS)
        for keeper in stuck:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, number: int) -> None:
        """Start one again whenever it has died."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        while True:
            began = loop.time()
            fault: dict[str, Any]
            try:
                fault = {"status": await self._live()}
            except Exception as error:  # no memory, no descriptors, no more processes: that may pass
                fault = {"exc_info": error}
            if self._leaving:
                return
            if loop.time() - began > SETTLED_S:
                pause = FIRST_PAUSE_S
            log.error("front died and is started again", front=number, pause=pause, **fault)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _live(self) -> int:
        """The life of one process; its exit status."""
        ours, theirs = socket.socketpair()
        with ours:  # until it is the gate's
            process = await self._start(theirs)
            try:
                assert process.stdin is not None
                orders = (self._config, self._started_at, self._serving.is_set())
                process.stdin.write(pickle.dumps(sys.path) + pickle.dumps(orders))
                process.stdin.close()
                gate = Gate(self._engine.core, self._reply)
                await gate.open(socket.socket(fileno=ours.detach()))
                return await self._serve(process, gate)
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()

    async def _start(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        descriptors = [theirs.fileno(), *(own.fileno() for own in self._sockets)]
        with theirs:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _START, *map(str, descriptors)),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=descriptors,
            )

    async def _serve(self, process: asyncio.subprocess.Process, gate: Gate) -> int:
        """Through the gate, until the process has ended; its exit status."""
        self._gates.add(gate)
        try:
            if self._parcel is not None:
                greeter = asyncio.ensure_future(self._greet(gate, self._parcel))
                self._greeters.add(greeter)
                greeter.add_done_callback(self._greeters.discard)
            if self._leaving:
                gate.leave()
            return await process.wait()
        finally:
            self._gates.discard(gate)
            self._departed = self._departed.plus([self._counted.pop(gate, Counts()).ended()])
            gate.close()

    async def _greet(self, gate: Gate, parcel: bytes) -> None:
        """Hand the model over, and wait until it is served."""
        gate.hand_over(parcel)
        try:
            await gate.ask("ready")
        except EngineError as error:  # its keeper knows more
            log.warning("front was lost before it served", reason=str(error))
        else:
            self._serving.set()

    # ── what a front asks, of all ────────────────────────────────────────────────────────────────────────

    async def _reply(self, question: str) -> bytes:
        match question:
            case "metrics":
                return self._metrics.text(await self._counts())
            case "load":
                return str(sum(counts.running for counts in await self._counts())).encode()
        await self._change(changes.read(question))
        return b""

    async def _change(self, change: changes.Change) -> None:
        """Once this returns, all of them know that read what they are sent."""
        await self._engine.core.change(change)
        told = list(self._gates)
        for gate in told:
            gate.tell()
        await asyncio.gather(*map(self._hear, told))

    async def _hear(self, gate: Gate) -> None:
        """Until it has read all that it was sent; a process that is stopped keeps nobody waiting for long."""
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(COUNT_SECONDS):
                await gate.ask("ready")

    async def _counts(self) -> list[Counts]:
        await asyncio.gather(*map(self._count, list(self._gates)))
        return [self._departed, *self._counted.values()]

    async def _count(self, gate: Gate) -> None:
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(COUNT_SECONDS):
                counted = Counts.decode(await gate.ask("counts"))
            if gate in self._gates:
                self._counted[gate] = counted


@asynccontextmanager
async def fronts(
    config: ServerConfig, engine: AsyncEngine, sockets: Sequence[socket.socket]
) -> AsyncIterator[Fronts]:
    """They serve while inside."""
    several = Fronts(config, engine, sockets)
    several.start()
    try:
        yield several
    finally:
        await several.stop()
