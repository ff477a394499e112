"""Locust itself is run, as `./dev load` does, against a server that only counts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed")
LOCUSTFILE = Path(__file__).resolve().parents[2] / "loadtest" / "locustfile.py"


class Stub(ThreadingHTTPServer):
    """Answers with as many vectors as it got texts, and `surplus` more."""

    daemon_threads = True
    surplus = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Locust hangs up in the middle when its time is over."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Stub

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(asked)
        self.server.keys.add(self.headers["Authorization"])
        count = 1 if isinstance(asked["input"], str) else len(asked["input"])
        data = [{"object": "embedding", "embedding": "AAAA"}] * (count + self.server.surplus)
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def locust(stub: Stub, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += ["--host", f"http://127.0.0.1:{stub.server_port}", "--users", "3", "--spawn-rate", "3"]
    command += ["--run-time", "1s", *arguments]
    env = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_every_kind_of_user_asks_for_one_and_for_many(stub: Stub) -> None:
    done = locust(stub, LOAD_BATCH="5")
    assert done.returncode == 0, done.stderr
    for name in ("short × 1", "short × 5", "mixed × 1", "mixed × 5", "long × 1", "long × 5"):
        assert name in done.stdout + done.stderr
    assert all(body["encoding_format"] == "base64" and "model" not in body for body in stub.bodies)
    assert stub.keys == {None}


def test_tags_and_the_environment_choose(stub: Stub) -> None:
    settings = {"LOAD_MODEL": "m", "LOAD_API_KEY": "k", "LOAD_ENCODING": "float", "LOAD_LENGTH_SIGMA": "0"}
    done = locust(stub, "--tags", "single", "--", "ShortTexts", **settings, LOAD_LENGTH_FACTOR="2")
    assert done.returncode == 0, done.stderr
    assert {len(body["input"].split()) for body in stub.bodies} == {16}
    assert {(body["model"], body["encoding_format"]) for body in stub.bodies} == {("m", "float")}
    assert stub.keys == {"Bearer k"}


def test_a_wrong_count_of_vectors_is_a_failure(stub: Stub) -> None:
    stub.surplus = 1
    done = locust(stub, "--tags", "single")
    assert done.returncode == 1
    assert "2 vectors for 1 texts" in done.stdout + done.stderr
