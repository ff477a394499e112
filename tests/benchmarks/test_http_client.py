"""The client against a server that answers by what it is asked."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest

import http_client
from http_client import Client, Job, Outcome

Answer = Callable[[str], bytes]


@contextmanager
def serving(answer: Answer, once: bool = False) -> Iterator[int]:
    """The port of a server whose whole answer to a request, head and all, is `answer(body)`; b"" hangs up, as do all
    `once` they are sent.
    """

    class Handler(StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            while head := self.rfile.readline():
                length = 0
                while line := self.rfile.readline().strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name == b"Content-Length" else length
                assert head == b"POST /v1/embeddings HTTP/1.1\r\n"
                reply = answer(self.rfile.read(length).decode())
                if not reply:
                    return
                self.wfile.write(reply[:40])  # in two pieces: answers need not come in one
                self.wfile.write(reply[40:])
                if once:
                    return

    class Server(ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def response(body: str, status: str = "200 OK", timing: str = "forward;dur=1.5, queue;dur=0.25") -> bytes:
    head = f"HTTP/1.1 {status}\r\nserver-timing: {timing}\r\ncontent-length: {len(body.encode())}\r\n\r\n"
    return (head + body).encode()


def embedding(text: str) -> str:
    return json.dumps({"data": [{"object": "embedding", "embedding": text}]})


def drive(answer: Answer, bodies: list[str], connections: int, keep: bool = False) -> Outcome:
    with serving(answer) as port:
        return Client(Job("127.0.0.1", port, "/v1/embeddings", bodies, connections, keep)).run()


@pytest.mark.parametrize("connections", [1, 7, 100])
def test_each_body_gets_its_own_answer(connections: int) -> None:
    bodies = [f"é{n}" for n in range(50)]
    outcome = drive(lambda body: response(embedding(body)), bodies, connections, keep=True)
    assert [json.loads(answer)["data"][0]["embedding"] for answer in outcome.answers] == bodies
    assert outcome.errors == {}
    assert outcome.stages == {"forward": [1.5] * 50, "queue": [0.25] * 50}
    for latency in outcome.latencies:
        assert latency is not None
        assert 0 < latency <= outcome.seconds
    assert outcome.cpu_seconds >= 0


def test_bad_answers_are_counted_and_not_timed() -> None:
    answers = {
        "busy": response("{}", "503 Service Unavailable"),
        "two": response('{"data": [{"embedding": "a"}, {"embedding": "b"}]}'),
        "gone": b"",
        "good": response(embedding("x")),
    }
    bodies = ["good", "busy", "gone", "two", "gone", "good"]
    outcome = drive(answers.__getitem__, bodies, connections=2)
    assert outcome.errors == {"status 503": 1, "connection lost": 2, 'not 1 × "embedding":': 1}
    assert [latency is not None for latency in outcome.latencies] == [True, False, False, False, False, True]
    assert [spent is not None for spent in outcome.stages["forward"]] == [True, *[False] * 4, True]


def test_it_runs_as_a_process() -> None:
    with serving(lambda body: response("{}", "500 Internal Server Error")) as port:
        job = Job("127.0.0.1", port, "/v1/embeddings", ["x", "y"], connections=2)
        command = [sys.executable, http_client.__file__]
        printed = subprocess.check_output(command, input=json.dumps(asdict(job)), text=True)
    outcome = Outcome(**json.loads(printed))
    assert outcome.errors == {"status 500": 2}
    assert outcome.latencies == [None, None]


def test_an_answer_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="without Content-Length"):
        drive(lambda body: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ["x"], connections=1)


def test_nobody_listening_is_an_error() -> None:
    with serving(lambda body: b"") as port:
        pass
    with pytest.raises(OSError, match="refused"):
        Client(Job("127.0.0.1", port, "/v1/embeddings", ["x"], connections=1)).run()


def test_an_open_loop_sends_when_due_and_counts_from_then() -> None:
    """One connection at a time, each answer 0.1 s under way, five due within 0.1 s: they queue here, and it shows."""

    def slow(body: str) -> bytes:
        time.sleep(0.1)
        return response(embedding(body))

    due = [0.02 * n for n in range(5)]
    with serving(slow) as port:
        many = Client(Job("127.0.0.1", port, "/v1/embeddings", list("abcde"), 5, due=due)).run()
        one = Client(Job("127.0.0.1", port, "/v1/embeddings", list("abcde"), 1, due=due)).run()
    assert many.errors == one.errors == {}
    assert all(latency is not None and latency >= 0.1 for latency in [*many.latencies, *one.latencies])
    for number, (latency, late) in enumerate(zip(one.latencies, one.late, strict=True)):
        # The last of n + 1 answers is in after at least (n + 1) tenths of a second.
        assert latency is not None
        assert latency >= 0.1 * (number + 1) - due[number]
        assert late >= 0.1 * number - due[number]
    assert one.seconds >= 0.5


def test_refusals_are_timed_apart() -> None:
    with serving(lambda body: response("{}", "503 Service Unavailable")) as port:
        outcome = Client(Job("127.0.0.1", port, "/v1/embeddings", ["x"] * 3, 3, due=[0, 0, 0.01])).run()
    assert outcome.errors == {"status 503": 3}
    assert len(outcome.refusals) == 3
    assert outcome.latencies == [None] * 3


def test_a_connection_that_is_hung_up_while_idle_is_no_error() -> None:
    """The server closes after each answer; an open loop finds that out before it sends the next."""
    with serving(lambda body: response(embedding(body)), once=True) as port:
        outcome = Client(Job("127.0.0.1", port, "/v1/embeddings", ["x", "y"], 2, due=[0, 0.2])).run()
    assert outcome.errors == {}
    assert None not in outcome.latencies


def test_other_answers_have_other_marks() -> None:
    body = json.dumps({"results": [{"relevance_score": 0.5}, {"relevance_score": 0.1}]})
    with serving(lambda _: response(body)) as port:
        job = Job("127.0.0.1", port, "/v1/embeddings", ["x"], 1, mark='"relevance_score":', marks=2)
        assert Client(job).run().errors == {}
