"""An HTTP client for load. In a closed loop every connection sends its next request when the answer to the last one is
in; in an open one requests are sent when they are due, whether others were answered or not, on as many connections as
that takes. There a request's time runs from when it was due: that the client or its connections were busy is no excuse.

It runs as a process of its own and is made to cost little, for it shares the machine with what it measures: requests
are bytes made beforehand, one thread waits on all sockets, and of an answer only the status, the length, the count
of results and the `Server-Timing` header are looked at. A job comes on stdin and its outcome leaves on stdout,
both JSON.
"""

from __future__ import annotations

import json
import re
import select
import socket
import subprocess
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
    """`bodies` are JSON texts, each POSTed once to `path`; a good answer has `mark` in it `marks` times.

    `due`: when each is to be sent, seconds from the start, in order; none for a closed loop.
    """

    host: str
    port: int
    path: str
    bodies: list[str]
    connections: int  # that are open at once; in an open loop, at most
    keep: bool = False  # hand the answers' bodies back
    due: list[float] = field(default_factory=list)
    mark: str = '"embedding":'
    marks: int = 1


@dataclass(slots=True)
class Outcome:
    """Lists are in the order of the job's bodies; None where the answer was not a good one.

    `stages[name]` are the milliseconds that the server says it spent. `refusals` are how long the answers took that had
    a status other than 200; `late`, by how much requests of an open loop were sent after they were due. In seconds.
    """

    seconds: float  # from the first byte sent to the last one received
    cpu_seconds: float  # of this client meanwhile
    latencies: list[float | None]
    stages: dict[str, list[float | None]]
    errors: dict[str, int]
    answers: list[str]  # empty unless kept
    refusals: list[float]
    late: list[float]


@dataclass(slots=True, eq=False)
class Connection:
    """One socket and the request that it is busy with, -1 if none."""

    socket: socket.socket
    index: int = -1
    since: float = 0.0  # the request was sent, or due
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


class Client:
    """Drives one job from the first request to the last answer."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._mark = job.mark.encode()
        self._requests = [_request(job, body.encode()) for body in job.bodies]
        self._sent = 0  # requests are sent in order
        self._poll = select.epoll()
        self._open: dict[int, Connection] = {}
        self._idle: list[Connection] = []  # of the open ones
        self._latencies: list[float | None] = [None] * len(self._requests)
        self._stages: dict[str, list[float | None]] = {}
        self._errors: Counter[str] = Counter()
        self._answers = [""] * len(self._requests) if job.keep else []
        self._refusals: list[float] = []
        self._late: list[float] = []

    def run(self) -> Outcome:
        """Raises OSError when nobody listens and TimeoutError when nobody answers."""
        if not self._job.due:
            for _ in range(min(self._job.connections, len(self._requests))):
                self._idle.append(self._connect())
        cpu, began = time.process_time(), time.perf_counter()
        due = [began + seconds for seconds in self._job.due]
        heard = began
        while True:
            wait = self._send(due)
            if len(self._idle) == len(self._open) and self._sent == len(self._requests):
                break
            ready = self._poll.poll(min(wait, SILENCE_SECONDS))
            now = time.perf_counter()
            heard = now if ready or len(self._idle) == len(self._open) else heard
            if now - heard >= SILENCE_SECONDS:
                busy = len(self._open) - len(self._idle)
                raise TimeoutError(f"{busy} requests without an answer for {SILENCE_SECONDS:.0f} s")
            for descriptor, _ in ready:
                self._read(self._open[descriptor])
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        for connection in list(self._open.values()):
            self._close(connection)
        return Outcome(
            seconds,
            cpu_seconds,
            self._latencies,
            self._stages,
            dict(self._errors),  # asdict does not know how to copy a Counter
            self._answers,
            self._refusals,
            self._late,
        )

    def _send(self, due: list[float]) -> float:
        """All that can be sent now; seconds until more is due."""
        while self._sent < len(self._requests):
            now = time.perf_counter()
            if due and due[self._sent] > now:
                return due[self._sent] - now
            if not self._idle and not (due and len(self._open) < self._job.connections):
                break
            connection = self._idle.pop() if self._idle else self._connect()
            connection.index = self._sent
            connection.received.clear()
            connection.since = due[self._sent] if due else time.perf_counter()
            if due:
                self._late.append(time.perf_counter() - connection.since)
            self._sent += 1
            with suppress(ConnectionError):  # reading finds it lost, too
                connection.socket.sendall(self._requests[connection.index])
        return SILENCE_SECONDS

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

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        now = time.perf_counter()
        if not data:
            self._lost(connection)
            return
        connection.received += data
        start = connection.body_starts()
        if start:
            self._record(connection, start, now - connection.since)
            connection.index = -1
            self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        """The server hung up: no fault unless it owed an answer. A closed loop goes on with a new connection."""
        if connection.index < 0:
            self._idle.remove(connection)
        else:
            self._errors["connection lost"] += 1
        self._close(connection)
        if not self._job.due:
            self._idle.append(self._connect())

    def _record(self, connection: Connection, start: int, latency: float) -> None:
        answer, index = connection.received, connection.index
        status = answer[9:12]
        if status != b"200":
            self._errors[f"status {status.decode()}"] += 1
            self._refusals.append(latency)
            return
        if answer.count(self._mark, start) != self._job.marks:
            self._errors[f"not {self._job.marks} × {self._job.mark}"] += 1
            return
        self._latencies[index] = latency
        for name, milliseconds in _STAGE.findall(answer, 0, start):
            column = self._stages.get(name.decode())
            if column is None:
                column = self._stages[name.decode()] = [None] * len(self._requests)
            column[index] = float(milliseconds)
        if self._job.keep:
            self._answers[index] = answer[start:].decode()


def drive(job: Job) -> Outcome:
    """Have it done by a process of its own."""
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(
        command, input=json.dumps(asdict(job)), stdout=subprocess.PIPE, text=True, check=True
    )
    return Outcome(**json.loads(done.stdout))


def _request(job: Job, body: bytes) -> bytes:
    head = (
        f"POST {job.path} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    print(json.dumps(asdict(Client(Job(**json.load(sys.stdin))).run())))


if __name__ == "__main__":
    main()
