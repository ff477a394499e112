"""Gate: the engine's end of the line to one front. What a front asks for runs in the core like all else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from carpool.engine.errors import Overloaded
from carpool.engine.frames import (
    Adapters,
    AnyFrame,
    Ask,
    Cancel,
    Leave,
    Parcel,
    Progress,
    Standing,
    answering,
    asked,
    failing,
)
from carpool.engine.line import Line

if TYPE_CHECKING:
    from carpool.engine.core import Core
    from carpool.engine.model_info import ModelInfo
    from carpool.engine.remote import RemoteCore

TELL_SECONDS = 0.05  # how old the last word on the queue may be


class Gate:
    """When the front goes away, so does all that it waits for."""

    def __init__(self, core: Core | RemoteCore, reply: Callable[[str], Awaitable[bytes]]) -> None:
        """`reply` answers what the front asks about the engine's process."""
        self._core = core
        self._reply = reply
        self._line: Line | None = None
        self._told: Standing | None = None
        self._told_model: ModelInfo | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._next_telling: asyncio.TimerHandle | None = None

    async def open(self, connection: socket.socket) -> None:
        self._line = await Line.open(connection, self, waits=True)
        self._tell_again()

    def hand_over(self, parcel: bytes) -> None:
        """What the front needs of the model, and with it the word that the engine is ready."""
        self.line.send(Parcel(), parcel)
        self.tell()

    def leave(self) -> None:
        """Have the front send what is left to send, and end."""
        self.tell()
        self.line.send(Leave())

    async def ask(self, question: str) -> bytes:
        """The front about itself. Raises EngineDead if it is gone."""
        return await self.line.ask(question)

    def close(self) -> None:
        self.line.close()

    @property
    def line(self) -> Line:
        assert self._line is not None, "not open"
        return self._line

    # ── how the engine is ────────────────────────────────────────────────────────────────────────────────

    def tell(self) -> None:
        """Now, if there is news: which adapters there are, and how the queue is. What is sent next finds it known."""
        core, full = self._core, None
        if core.parts is not None and (model := core.parts.model) is not self._told_model:
            self._told_model = model
            self.line.send(Adapters(dict(model.adapters), dict(model.lora_modules)))
        try:
            core.check()
        except Overloaded as error:
            full = (str(error), error.retry_after)
        now = Standing(core.state, core.waiting_tokens, core.waiting_sequences, core.tokens_per_second, full)
        if now != self._told:
            self._told = now
            self.line.send(now)

    def _tell_again(self) -> None:
        self.tell()
        self._next_telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell_again)

    # ── what the front says ──────────────────────────────────────────────────────────────────────────────

    def received(self, frame: AnyFrame, body: bytes) -> None:
        match frame:
            case Ask():
                task = asyncio.ensure_future(self._run(frame, body))
                self._tasks[frame.number] = task
                task.add_done_callback(lambda _: self._tasks.pop(frame.number, None))
            case Cancel():
                if waiting := self._tasks.get(frame.number):
                    waiting.cancel()

    def hung_up(self) -> None:
        if self._next_telling is not None:
            self._next_telling.cancel()
        for task in self._tasks.values():
            task.cancel()

    async def reply(self, question: str) -> bytes:
        return await self._reply(question)

    async def _run(self, ask: Ask, body: bytes) -> None:
        progress = partial(self._progressed, ask.number) if ask.wants_progress else None
        try:
            result = await self._core.run(*asked(ask, body), ask.timeout, progress)
            self.line.send(*answering(ask.number, result))
        except Exception as error:
            # First that the queue is full, so that no more are made ready in vain; or what adapter has the name now.
            self.tell()
            self.line.send(failing(ask.number, error))

    def _progressed(self, number: int, rows: int) -> None:
        self.line.send(Progress(number, rows))
