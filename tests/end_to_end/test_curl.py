"""What the README shows works as shown, with the tool it shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from process import Process

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], check=True, capture_output=True, text=True).stdout


def post(process: Process, path: str, body: str, *arguments: str) -> Any:
    json_type = ["-H", "Content-Type: application/json"]
    return json.loads(curl(f"{process.url}{path}", *json_type, *arguments, "-d", body))


def test_an_embedding(minilm: Process) -> None:
    answer = post(minilm, "/v1/embeddings", '{"input": "Many texts, one ride."}')

    assert answer["object"] == "list"
    assert answer["id"].startswith("embd-")
    assert len(answer["data"][0]["embedding"]) == 384
    assert answer["usage"] == {
        "prompt_tokens": 8,
        "total_tokens": 8,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


def test_tokens_and_back(minilm: Process) -> None:
    tokens = post(minilm, "/tokenize", '{"prompt": "hello world", "return_token_strs": true}')
    assert tokens == {
        "count": 4,
        "max_model_len": 256,
        "tokens": [101, 7592, 2088, 102],
        "token_strs": ["[CLS]", "hello", "world", "[SEP]"],
    }
    back = post(minilm, "/detokenize", json.dumps({"tokens": tokens["tokens"]}))
    assert back == {"prompt": "[CLS] hello world [SEP]"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["/v1/embeddings", "-d", "{}"], 415),
        (["/v1/embeddings", "-H", "Content-Type: application/json", "-d", "{broken"], 400),
        (["/v1/embeddings", "-H", "Content-Type:", "-d", '{"input": "a"}'], 200),
        (["/v1/embeddings"], 405),
        (["/v1/embeddings/", "-H", "Content-Type: application/json", "-d", '{"input": "a"}'], 200),
        (["/no/such/path"], 404),
        (["/health", "-I"], 200),
    ],
)
def test_the_status_and_the_shape(minilm: Process, arguments: list[str], status: int) -> None:
    path, *options = arguments
    output = curl(f"{minilm.url}{path}", *options, "-w", "\n%{http_code} %{content_type}")
    body, _, tail = output.rpartition("\n")

    assert tail.split()[0] == str(status)
    if status != 200:
        assert tail.split()[1] == "application/json"
        assert json.loads(body)["code"] == status
