"""Adapters that come and go under load, with the HTTP in one process and in two: nobody ever rides on the wrong one."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModel

import tiny
from process import Process, carpool_serve
from tiny_adapters import with_lora, write_lora

TEXT, IDS = "the cat sat", [5, 9, 11, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters `one` and `two` for it."""
    root = tmp_path_factory.mktemp("adapters")
    tiny.bert(root / "model")
    for seed, name in enumerate(("one", "two")):
        write_lora(root / name, stock(root), seed, target_modules=["query", "value"])
    return root


@pytest.fixture(scope="module", params=["1", "2"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Process]:
    arguments = ["--cpu-workers", "1", "--api-workers", request.param, "--max-num-batched-tokens", "512"]
    arguments += ["--dtype", "float32", "--allow-runtime-lora-updating", "--cache-size", "1MiB"]
    log = folder / f"{request.param}.log"
    with carpool_serve(log, str(folder / "model"), *arguments) as process:
        yield process


def stock(root: Path) -> Any:
    return AutoModel.from_pretrained(root / "model", dtype=torch.float32).eval()


def ask(process: Process, path: str, body: Any = None) -> tuple[int, Any]:
    """Over a connection of its own, which either front may take."""
    connection = http.client.HTTPConnection(urlsplit(process.url).netloc, timeout=60)
    try:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        content = answer.read()
        text = answer.headers.get_content_type() == "text/plain"
        return answer.status, content.decode() if text else json.loads(content)
    finally:
        connection.close()


def embed(process: Process, model: str) -> tuple[int, Any]:
    status, answer = ask(process, "/v1/embeddings", {"input": [IDS], "model": model})
    return status, answer["data"][0]["embedding"] if status == 200 else answer["message"]


def load(process: Process, name: str, path: Path, **fields: Any) -> tuple[int, Any]:
    return ask(process, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})


def truth(folder: Path, name: str) -> Any:
    """The mean over the tokens, as transformers and PEFT have it."""
    with torch.no_grad():
        hidden = with_lora(stock(folder), folder / name)(input_ids=torch.tensor([IDS])).last_hidden_state[0]
    mean = hidden.mean(0)
    return pytest.approx((mean / mean.norm()).tolist(), abs=1e-4)


def names(process: Process) -> list[str]:
    return [card["id"] for card in ask(process, "/v1/models")[1]["data"]]


def test_what_was_loaded_is_there_for_the_next_request_and_what_was_unloaded_for_none(
    server: Process, folder: Path
) -> None:
    one, two = truth(folder, "one"), truth(folder, "two")
    for _ in range(5):  # whichever front is asked
        assert load(server, "a", folder / "one") == (200, "Success: LoRA adapter 'a' added successfully.")
        assert embed(server, "a") == (200, one)
        assert names(server)[1:] == ["a"]
        assert load(server, "a", folder / "two")[0] == 400
        assert load(server, "a", folder / "two", load_inplace=True)[0] == 200
        assert embed(server, "a") == (200, two)
        status, said = ask(server, "/v1/unload_lora_adapter", {"lora_name": "a"})
        assert (status, said) == (200, "Success: LoRA adapter 'a' removed successfully.")
        assert embed(server, "a") == (404, "The model `a` does not exist.")
        assert names(server)[1:] == []
    assert ask(server, "/v1/unload_lora_adapter", {"lora_name": "a"})[0] == 404
    status, failure = load(server, "b", folder / "model")
    assert (status, failure["param"]) == (400, "lora_path")
    assert "has no adapter_config.json" in failure["message"]


def test_under_load_every_answer_is_an_adapters_of_that_name(server: Process, folder: Path) -> None:
    """While it is exchanged, a request gets the old or the new one: never the bare model, and never a failure."""
    either = truth(folder, "one"), truth(folder, "two")
    assert load(server, "hot", folder / "one")[0] == 200
    wrong: list[Any] = []
    over = threading.Event()

    def client(number: int) -> None:
        while not over.is_set():
            texts = [[*IDS, number, i] for i in range(3)]  # so that batches are mixed
            ask(server, "/v1/embeddings", {"input": texts, "model": "hot" if number % 2 else None})
            status, vector = embed(server, "hot")
            if status != 200 or vector not in either:
                wrong.append((status, vector))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    for turn in range(10):
        assert load(server, "hot", folder / ("two", "one")[turn % 2], load_inplace=True)[0] == 200
    over.set()
    for thread in clients:
        thread.join()
    assert not wrong
    assert ask(server, "/v1/unload_lora_adapter", {"lora_name": "hot"})[0] == 200
