"""A closed-loop HTTP client: every connection sends its next request when the answer to the last one is in.

It runs as a process of its own and is made to cost little, for it shares the machine with what it measures: requests
are bytes made beforehand, one thread waits on all sockets, and of an answer only the status, the length, the count
of embeddings and the `Server-Timing` header are looked at. A job comes on stdin and its outcome leaves on stdout,
both JSON.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field

SILENCE_SECONDS = 60.0  # no byte from any connection for so long: something is broken

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STAGE = re.compile(rb"(\w+);dur=([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Job:
    """`bodies` are JSON texts, each POSTed once to `path`; a good answer holds one embedding."""

    host: str
    port: int
    path: str
    bodies: list[str]
    connections: int
    keep: bool = False  # hand the answers' bodies back


@dataclass(slots=True)
class Outcome:
    """Lists are in the order of the job's bodies; None where the answer was not a good one.

    `stages[name]` are the milliseconds that the server says it spent.
    """

    seconds: float  # from the first byte sent to the last one received
    cpu_seconds: float  # of this client meanwhile
    latencies: list[float | None]  # seconds
    stages: dict[str, list[float | None]]
    errors: dict[str, int]
    answers: list[str]  # empty unless kept


@dataclass(slots=True, eq=False)
class Connection:
    """One socket and the request that it is busy with."""

    socket: socket.socket
    index: int = -1
    sent_at: float = 0.0
    received: bytearray = field(default_factory=bytearray)

    def body_starts(self) -> int:
        """Where the answer's body starts, once all of it is here; 0 before."""
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return 0
        length = _LENGTH.search(self.received, 0, end)
        if length is None:
            raise ValueError(f"an answer without Content-Length: {bytes(self.received[:end])!r}")
        start = end + 4
        return start if len(self.received) >= start + int(length[1]) else 0


class ClosedLoop:
    """Drives one job from the first request to the last answer."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._requests = [_request(job, body.encode()) for body in job.bodies]
        self._waiting = iter(range(len(self._requests)))
        self._poll = select.epoll()
        self._open: dict[int, Connection] = {}
        self._latencies: list[float | None] = [None] * len(self._requests)
        self._stages: dict[str, list[float | None]] = {}
        self._errors: Counter[str] = Counter()
        self._answers = [""] * len(self._requests) if job.keep else []

    def run(self) -> Outcome:
        """Raises OSError when nobody listens and TimeoutError when nobody answers."""
        for _ in range(min(self._job.connections, len(self._requests))):
            self._connect()
        cpu, began = time.process_time(), time.perf_counter()
        for connection in list(self._open.values()):
            self._send_next(connection)
        while self._open:
            ready = self._poll.poll(SILENCE_SECONDS)
            if not ready:
                raise TimeoutError(
                    f"{len(self._open)} requests without an answer for {SILENCE_SECONDS:.0f} s"
                )
            for descriptor, _ in ready:
                self._read(self._open[descriptor])
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        errors = dict(self._errors)  # asdict does not know how to copy a Counter
        return Outcome(seconds, cpu_seconds, self._latencies, self._stages, errors, self._answers)

    def _connect(self) -> Connection:
        connection = Connection(socket.create_connection((self._job.host, self._job.port)))
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        return connection

    def _close(self, connection: Connection) -> None:
        self._poll.unregister(connection.socket)
        del self._open[connection.socket.fileno()]
        connection.socket.close()

    def _send_next(self, connection: Connection) -> None:
        """Send what waits next; with nothing left, hang up."""
        index = next(self._waiting, None)
        if index is None:
            self._close(connection)
            return
        connection.index = index
        connection.received.clear()
        connection.sent_at = time.perf_counter()
        with suppress(ConnectionError):  # reading finds it lost, too
            connection.socket.sendall(self._requests[index])

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        now = time.perf_counter()
        if not data:
            self._errors["connection lost"] += 1
            self._close(connection)
            connection = self._connect()
        else:
            connection.received += data
            start = connection.body_starts()
            if not start:
                return
            self._record(connection, start, now - connection.sent_at)
        self._send_next(connection)

    def _record(self, connection: Connection, start: int, latency: float) -> None:
        answer, index = connection.received, connection.index
        status = answer[9:12]
        if status != b"200":
            self._errors[f"status {status.decode()}"] += 1
            return
        if answer.count(b'"embedding":', start) != 1:
            self._errors["not one embedding"] += 1
            return
        self._latencies[index] = latency
        for name, milliseconds in _STAGE.findall(answer, 0, start):
            column = self._stages.get(name.decode())
            if column is None:
                column = self._stages[name.decode()] = [None] * len(self._requests)
            column[index] = float(milliseconds)
        if self._job.keep:
            self._answers[index] = answer[start:].decode()


def _request(job: Job, body: bytes) -> bytes:
    head = (
        f"POST {job.path} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    print(json.dumps(asdict(ClosedLoop(Job(**json.load(sys.stdin))).run())))


if __name__ == "__main__":
    main()
