"""`--api-workers 2`: one server to those who ask, whatever becomes of its processes."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

import tiny
from process import Process, carpool_serve

TEXTS = ["the cat sat", "on the mat", "a" * 50, "the cat sat"]
LONGS = [f"{'cat ' * 60}{i}" for i in range(200)]
ASKED: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/embeddings", {"input": TEXTS}),
    ("POST", "/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}),
    ("POST", "/v1/embeddings", {"input": [[5, 6, 7], [8]], "embed_dtype": "bfloat16"}),
    ("POST", "/v2/embed", {"texts": TEXTS, "input_type": "x", "embedding_types": ["float", "int8"]}),
    ("POST", "/pooling", {"input": TEXTS, "task": "token_embed"}),
    ("POST", "/rerank", {"query": "cat", "documents": TEXTS}),
    ("POST", "/score", {"queries": "cat", "documents": TEXTS}),
    ("POST", "/embed", {"inputs": TEXTS}),
    ("POST", "/tokenize", {"prompt": "the cat", "return_token_strs": True}),
    ("POST", "/detokenize", {"tokens": [5, 6]}),
    ("POST", "/classify", {"input": "cat"}),
    ("POST", "/v1/embeddings", {"input": "a " * 5000}),
    ("POST", "/v1/embeddings", {"input": [[10**6]]}),
    ("POST", "/v1/embeddings", {"input": [""], "dimensions": 5}),
    ("POST", "/v1/embeddings", {"input": "a", "model": "unknown"}),
    ("POST", "/v1/embeddings", {}),
    ("GET", "/info", None),
    ("GET", "/v1/models", None),
    ("GET", "/health", None),
    ("GET", "/nowhere", None),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "model"
    tiny.bert(folder)
    return folder


@pytest.fixture(scope="module")
def double(model: Path) -> Iterator[Process]:
    arguments = ["--cpu-workers", "1", "--api-workers", "2", "--max-num-batched-tokens", "512"]
    with carpool_serve(model.parent / "double.log", str(model), *arguments) as process:
        yield process


@pytest.fixture(scope="module")
def single(model: Path) -> Iterator[Process]:
    arguments = ["--cpu-workers", "1", "--max-num-batched-tokens", "512"]
    with carpool_serve(model.parent / "single.log", str(model), *arguments) as process:
        yield process


def ask(process: Process, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Over a connection of its own, which either front may take."""
    connection = http.client.HTTPConnection(urlsplit(process.url).netloc, timeout=60)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def fronts(process: Process) -> list[int]:
    pid = process.popen.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def until(true: Any) -> None:
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def count(process: Process, series: str) -> float:
    """The sum of all series that look so in /metrics."""
    text = ask(process, "GET", "/metrics")[1].decode()
    return sum(map(float, re.findall(rf"^{series} (\S+)$", text, re.MULTILINE)))


def served(process: Process) -> float:
    """Embedding requests that were answered with 200."""
    return count(process, r'carpool_requests_total\{endpoint="/v1/embeddings",.*status="200"\}')


def timeless(body: bytes) -> bytes:
    """Without what no two answers share."""
    return re.sub(rb'"(id|created)":\s*("[^"]*"|\d+)', b"", body)


def test_answers_are_those_of_one_process_to_the_byte(single: Process, double: Process) -> None:
    for method, path, body in ASKED:
        (status, one), (same, other) = (ask(each, method, path, body) for each in (single, double))
        assert (path, status, timeless(one)) == (path, same, timeless(other))


def test_many_clients_at_once_are_answered_each_with_its_own(double: Process) -> None:
    """Two threads a front and more, the official client's connections kept alive."""
    expected = {text: vector(double, text) for text in TEXTS}
    wrong: list[str] = []

    def work(seed: int) -> None:
        client = openai.OpenAI(base_url=f"{double.url}/v1", api_key="none", max_retries=0)
        for i in range(25):
            text = TEXTS[(seed + i) % len(TEXTS)]
            answer = client.embeddings.create(model="", input=[text], encoding_format="float")
            if answer.data[0].embedding != expected[text]:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def vector(process: Process, text: str) -> list[float]:
    found: list[float] = json.loads(ask(process, "POST", "/v1/embeddings", {"input": text})[1])["data"][0][
        "embedding"
    ]
    return found


def test_any_front_tells_what_all_have_counted(double: Process) -> None:
    before = served(double)
    for i in range(20):
        assert ask(double, "POST", "/v1/embeddings", {"input": f"cat {i}"})[0] == 200
    assert [served(double) for _ in range(6)] == [before + 20] * 6
    assert count(double, r"carpool_batch_tokens_count\{.*\}") >= 20, "the engine's own series are there too"
    assert ask(double, "GET", "/metrics")[1].count(b"# TYPE carpool_queue_tokens ") == 1
    assert json.loads(ask(double, "GET", "/load")[1]) == {"server_load": 0}


def test_a_front_that_dies_is_started_again(double: Process) -> None:
    before, old = served(double), fronts(double)
    assert len(old) == 2
    os.kill(old[0], signal.SIGKILL)
    until(lambda: len(fronts(double)) == 2 and old[0] not in fronts(double))
    os.kill(old[1], signal.SIGKILL)  # so that only new ones can answer
    until(lambda: len(fronts(double)) == 2 and not {*old} & {*fronts(double)})
    answer = ask(double, "POST", "/v1/embeddings", {"input": "cat"})
    assert answer[0] == 200, "who comes while they load waits, and is not refused"
    assert served(double) == before + 1, "a counter never falls"
    assert double.log.read_text().count("front died and is started again") == 2


def test_a_signal_to_all_of_them_lets_accepted_work_finish(double: Process) -> None:
    """Ctrl-C, and a supervisor that ends a whole group, reach every process."""
    answers: list[int] = []

    def embed(number: int) -> None:
        body = {"input": [f"{text} {number}" for text in LONGS]}
        answers.append(ask(double, "POST", "/v1/embeddings", body)[0])

    threads = [threading.Thread(target=embed, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: count(double, r"carpool_queue_sequences\{.*\}") >= 100)
    children = fronts(double)
    for pid in children:
        for known in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, known)
    assert double.terminate() == 0
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert set(answers) <= {200, 503}
    assert answers.count(200) >= 1
    assert not any(map(alive, children))
    assert "Traceback" not in double.log.read_text()


def test_fronts_do_not_outlive_the_engine(model: Path) -> None:
    arguments = ["--cpu-workers", "1", "--api-workers", "2"]
    with carpool_serve(model.parent / "orphans.log", str(model), *arguments) as process:
        children = fronts(process)
        assert len(children) == 2
        process.popen.kill()
        until(lambda: not any(map(alive, children)))
    assert "Traceback" not in process.log.read_text()
