"""The server as a process: what it needs, how it copes with clients that leave, how it ends."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

import tiny
from process import Process, carpool_serve


def metric(process: Process, name: str) -> float:
    with urlopen(f"{process.url}/metrics") as answer:
        text = answer.read().decode()
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in /metrics"
    return float(found[1])


def embed(process: Process, body: object) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(process.url).netloc, timeout=120)
    connection.request("POST", "/v1/embeddings", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def different(count: int) -> list[str]:
    """Long texts, none of them equal: those would be run once."""
    return ["word " * 200 + str(i) for i in range(count)]


def test_it_fits_in_800_mb(minilm: Process) -> None:
    assert embed(minilm, {"input": different(64)})[0] == 200
    assert minilm.resident_mb() < 800


def test_a_client_that_leaves_takes_its_waiting_texts_along(minilm: Process) -> None:
    cancelled = metric(minilm, "carpool_cancelled_total")
    body = json.dumps({"input": different(200)}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", urlsplit(minilm.url).port or 0)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        while not metric(minilm, "carpool_queue_sequences"):
            time.sleep(0.01)
    give_up = time.monotonic() + 10
    while metric(minilm, "carpool_queue_sequences") or metric(minilm, "carpool_queue_tokens"):
        assert time.monotonic() < give_up
        time.sleep(0.02)

    assert metric(minilm, "carpool_cancelled_total") > cancelled
    assert embed(minilm, {"input": "still here"})[0] == 200


def test_sigterm_under_load_answers_all_that_was_accepted_and_exits_0(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.bert(model)
    with carpool_serve(tmp_path / "log", str(model), "--cpu-workers", "1") as process:
        answers: list[int] = []

        def ask(number: int) -> None:
            texts = ["cat " * 60 + f"{number} {i}" for i in range(200)]
            answers.append(embed(process, {"input": texts})[0])

        asked = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in asked:
            thread.start()
        while metric(process, "carpool_queue_sequences") < 100:
            time.sleep(0.005)
        assert process.terminate() == 0
        for thread in asked:
            thread.join()

    # Those still on their way when the signal came may be refused; none that was accepted is lost.
    assert set(answers) <= {200, 503}
    assert answers.count(200) >= 1
    assert len(answers) == 8


def test_a_model_that_cannot_be_served_is_one_sentence_and_a_failure(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(AssertionError, match=r"has no config\.json"),
        carpool_serve(tmp_path / "log", str(tmp_path / "model")),
    ):
        pass
    assert "Traceback" not in (tmp_path / "log").read_text()
