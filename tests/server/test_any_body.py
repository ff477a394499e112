"""No body whatsoever makes a 500: thousands of spoiled requests to every endpoint, on every kind of model."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from carpool.server.app import ROUTES
from fakes import FAKES, FakeEngine
from serving import Answer, Served, assert_error, serving

PART: dict[str, Any] = {"type": "text", "text": "hi"}
CHAT: list[Any] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [PART]}]
COMMON: dict[str, Any] = {
    "model": "all-MiniLM-L6-v2",
    "truncate_prompt_tokens": 5,
    "truncation_side": "left",
    "padding": "do_not_pad",
    "use_activation": True,
    "priority": 1,
    "request_id": "mine",
    "cache_salt": "salt",
    "user": "u",
    "mm_processor_kwargs": {},
}
CHATTY: dict[str, Any] = {
    "add_special_tokens": False,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {"a": [1]},
}
VECTORS = {"encoding_format": "base64", "embed_dtype": "float16", "endianness": "big", "dimensions": 8}
PAIRS = {"max_tokens_per_query": 3, "max_tokens_per_doc": 3, "instruction": "do", "chat_template_kwargs": {}}
TEI = {"truncate": True, "truncation_direction": "Left"}

EMBEDDINGS: list[Any] = [
    {"input": ["a", "b"], **COMMON, **VECTORS, "truncation": True, "truncate": "END"},
    {"input": [[5, 6], [7]], **COMMON},
    {"input": [5, 6], "encoding_format": "bytes"},
    {"messages": CHAT, **CHATTY},
    {"input": [CHAT, CHAT], **CHATTY},
    {"input": ["a", "b"], "modality": ["text"]},
]
POOLING = [{**body, "task": "encode"} for body in EMBEDDINGS[:5]] + [
    {"input": "a", "task": "embed&sparse_embed"},
    {"data": {"a": 1}},
]
CLASSIFY: list[Any] = [
    {"input": ["a", "b"], **COMMON},
    {"messages": [CHAT, CHAT], **CHATTY},
    {"input": ["a", "b"], "raw_scores": True},
]
SCORE: list[Any] = [
    {"text_1": "a", "text_2": ["b", {"content": [PART]}], **COMMON, **PAIRS},
    {"queries": ["a", "b"], "documents": ["c", "d"]},
    {"data_1": "a", "data_2": "b", "items": ["c"]},
]
RERANK: list[Any] = [
    {"query": "a", "documents": ["b", {"text": "c"}, {"content": [PART]}], "top_n": 1, **COMMON, **PAIRS},
    {
        "query": {"content": [PART]},
        "documents": "b",
        "top_k": 2,
        "return_documents": False,
        "truncation": True,
    },
    {"query": "a", "documents": ["b", "c"], "raw_scores": False, "return_documents": True},
    {"query": "a", "texts": ["b", "c"], "raw_scores": True, "return_text": True, **TEI},
]
PREDICT: list[Any] = [
    {"inputs": [["a", "b"], ["c"]], "raw_scores": True, **TEI},
    {"inputs": ["a", "b"]},
    {"inputs": "a", "parameters": {"top_k": 2, "function_to_apply": "none"}},
    {"inputs": ["a", "b", "c"], "parameters": {}},
    {"inputs": [{"text": "a", "text_pair": "b"}, "c", ["d"]]},
]
SIMILARITY: list[Any] = [
    {
        "inputs": {"source_sentence": "a", "sentences": ["b", "c"]},
        "parameters": {"prompt_name": "query", **TEI},
    }
]
GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/embeddings": EMBEDDINGS,
    "/pooling": POOLING,
    "/classify": CLASSIFY,
    "/score": SCORE,
    "/rerank": RERANK,
    "/v2/embed": [
        {
            "texts": ["a", "b"],
            "input_type": "query",
            "embedding_types": ["float", "ubinary"],
            "output_dimension": 8,
            "truncate": "START",
            "max_tokens": 4,
            "priority": 1,
        },
        {"inputs": [{"content": [PART]}], "truncate": "NONE"},
        {"images": ["x"]},
    ],
    "/embed": [
        {"inputs": ["a", "b"], "prompt_name": "query", "normalize": False, "dimensions": 8, **TEI},
        {"inputs": [[5], [6]]},
    ],
    "/embed_all": [{"inputs": ["a", "b"], "prompt_name": "query", **TEI}, {"inputs": [5]}],
    "/embed_sparse": [{"inputs": ["a", "b"], "prompt_name": "query", **TEI}, {"inputs": [5]}],
    "/predict": PREDICT,
    "/similarity": SIMILARITY,
    "/invocations": [*EMBEDDINGS[:2], *SCORE[:1], *RERANK],
    "/": [*PREDICT, *SIMILARITY],
    "/tokenize": [
        {"prompt": "a", "return_token_strs": True},
        {"messages": CHAT, **CHATTY},
        {"inputs": ["a", "é"], "add_special_tokens": False, "prompt_name": "query"},
    ],
    "/decode": [{"ids": [5, 6], "skip_special_tokens": False}, {"ids": [[5], [6, 7]]}],
    "/detokenize": [{"tokens": [5, 6]}],
}
NASTY: list[Any] = [
    None,
    True,
    "",
    "\ud800",
    "a\x00b",
    "x" * 600,
    "nope",
    "NaN",
    "9" * 5000,
    0,
    -1,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    2**63,
    -(2**70),
    10**400,
    [],
    [[]],
    [None],
    [["a"], "b", 5],
    ["a", 5],
    [5, "6", 7.5],
    [99999],
    [[5], ["a"]],
    [[[5]]],
    {},
    {"role": 5},
    {"content": 5},
    {"role": "a", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
    [{"role": "a", "content": {"deep": [[[[]]]]}}],
    [[{"role": "a"}], [5]],
    {"a": {"b": {"c": [1, 2, 3]}}},
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value of a document can be replaced."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = document.copy()
    copy[path[0]] = replaced(document[path[0]], path[1:], value)
    return copy


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good request to some endpoint, with something in it changed."""
    path = draw(st.sampled_from(sorted(GOOD)))
    document: Any = draw(st.sampled_from(GOOD[path]))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(places(document)))
        document = replaced(document, place, draw(st.sampled_from(NASTY) | json_values))
    if isinstance(document, dict) and draw(st.booleans()):
        document = {key: value for key, value in document.items() if draw(st.integers(0, 3))}
    body = bytearray(json.dumps(document).encode())
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(body)))
        body[at:at] = draw(
            st.sampled_from(
                [b"", b"[" * 3000, b"\xff", b"\\ud800", b"1e999", b"{", b'"', b",", b"NaN", b"\x00"]
            )
        )
    return path, bytes(body)


def test_every_endpoint_that_takes_a_body_is_among_them() -> None:
    aliases = {"/embeddings", "/v1/classify", "/v1/score", "/v1/rerank", "/v2/rerank"}
    changes = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}  # of the server: handlers/test_changes.py
    assert {route.path for route in ROUTES if route.request is not None} == GOOD.keys() | aliases | changes


@pytest.mark.parametrize("kind", FAKES)
async def test_good_bodies_are_good_for_the_models_that_can(kind: str) -> None:
    async with served(kind) as server:
        statuses = {
            path: [(await server.post(path, body)).status for body in bodies] for path, bodies in GOOD.items()
        }
    assert all(statuses[path] == [200] * len(GOOD[path]) for path in ("/tokenize", "/detokenize", "/decode"))
    able = {
        "embedder": {
            "/v1/embeddings": 6,
            "/pooling": 5,
            "/v2/embed": 2,
            "/score": 3,
            "/rerank": 4,
            "/similarity": 1,
            "/": 4,
            "/embed": 2,
            "/embed_all": 2,
            "/embed_sparse": 0,
        },
        "m3": {"/pooling": 6, "/embed_all": 2, "/embed_sparse": 2},
        "classifier": {"/classify": 3, "/predict": 5, "/": 5},
        "cross-encoder": {"/classify": 3, "/predict": 5, "/score": 3, "/rerank": 4},
        "tagger": {"/pooling": 4},
    }[kind]
    assert {path: statuses[path].count(200) for path in able} == able


@pytest.mark.parametrize("kind", FAKES)
async def test_bad_bodies_are_refused_and_nothing_breaks(kind: str) -> None:
    loop = asyncio.get_running_loop()
    async with served(kind) as server:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(requests=st.lists(spoiled(), min_size=20, max_size=20))
        def post(requests: list[tuple[str, bytes]]) -> None:
            answers = asyncio.run_coroutine_threadsafe(ask_all(server, requests), loop).result()
            for answer, request in zip(answers, requests, strict=True):
                assert answer.status in (200, 400, 404), (request, answer.body)
                if answer.status != 200:
                    message = assert_error(answer, answer.status, answer.json["type"], answer.json["param"])
                    assert not re.search(r"Traceback|\.py|object at 0x|Error:", message), message

        with capture_logs() as lines:
            await asyncio.to_thread(post)
            assert (await server.get("/load")).json == {"server_load": 0}
    assert not [line for line in lines if line["log_level"] not in ("info", "debug")]


async def ask_all(server: Served, requests: list[tuple[str, bytes]]) -> list[Answer]:
    return await asyncio.gather(*(server.post(path, body) for path, body in requests))


def served(kind: str) -> Any:
    return serving(engine=FakeEngine(replace(FAKES[kind], chat_template=True, prompts={"query": "Q: "})))
