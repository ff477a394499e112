"""Line: one end of the socket between the engine's process and a front's. Frames go both ways, and questions."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Protocol

from carpool.engine.errors import EngineDead
from carpool.engine.frames import (
    AnyFrame,
    Bytes,
    Failed,
    Frame,
    Question,
    Reader,
    Reply,
    failed,
    failing,
    written,
)


class End(Protocol):
    """Who is told what comes."""

    def received(self, frame: AnyFrame, body: bytes) -> None:
        """A frame that is neither a question nor a reply."""

    def hung_up(self) -> None:
        """The other process is gone; nothing comes any more."""

    async def reply(self, question: str) -> bytes:
        """What the other process asks."""


class Line(asyncio.Protocol):
    """Frames of one turn of the event loop leave in one write."""

    def __init__(self, end: End, *, waits: bool = False) -> None:
        """`waits`: nothing is read from who does not read. One end of two may, or both would wait for ever."""
        self._end = end
        self._waits = waits
        self._reader = Reader()
        self._transport: Any = None
        self._unsent: list[Bytes] = []
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._replies: set[asyncio.Task[None]] = set()
        self._next_number = 0
        self._closed = asyncio.Event()

    @classmethod
    async def open(cls, connection: socket.socket, end: End, *, waits: bool = False) -> Line:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        _, line = await loop.create_unix_connection(lambda: cls(end, waits=waits), sock=connection)
        return line

    def send(self, frame: Frame, body: Bytes = b"") -> None:
        """To nobody, once the line is closed: who waits for an answer has been told."""
        if self._closed.is_set():
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += written(frame, body)

    def _flush(self) -> None:
        if not self._closed.is_set():
            self._transport.writelines(self._unsent)
        self._unsent = []

    async def ask(self, question: str) -> bytes:
        """Raises what the other process raised, and EngineDead if it is gone."""
        if self._closed.is_set():
            raise _gone()
        number = self._next_number
        self._next_number += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        self.send(Question(number, question))
        try:
            return await future
        finally:
            del self._asked[number]

    def close(self) -> None:
        """What was sent is still delivered."""
        if not self._closed.is_set():
            self._flush()
            self._transport.close()

    async def closed(self) -> None:
        await self._closed.wait()

    # ── what the loop says ───────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for frame, body in self._reader.read(data):
            match frame:
                case Question():
                    task = asyncio.ensure_future(self._reply(frame))
                    self._replies.add(task)
                    task.add_done_callback(self._replies.discard)
                case Reply():
                    self._settle(frame.number, body)
                case Failed() if frame.number < 0:
                    self._settle(~frame.number, failed(frame))
                case _:
                    self._end.received(frame, body)

    def pause_writing(self) -> None:
        if self._waits:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._waits:
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set()
        for number in list(self._asked):
            self._settle(number, _gone())
        for task in self._replies:
            task.cancel()
        self._end.hung_up()

    def _settle(self, number: int, result: bytes | Exception) -> None:
        future = self._asked.get(number)
        if future is None or future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    async def _reply(self, question: Question) -> None:
        try:
            self.send(Reply(question.number), await self._end.reply(question.name))
        except Exception as error:
            self.send(failing(~question.number, error))  # below 0: of a question, not of a request


def _gone() -> EngineDead:
    return EngineDead("The other process is gone.", retry_after=10)
