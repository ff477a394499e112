"""POST /invocations: what the body looks like says what is meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fakes import FAKE_MODEL, FAKES, FakeEngine
from serving import assert_error, serving

MODELS = {**FAKES, "late": replace(FAKE_MODEL, default_task="token_embed")}


@pytest.mark.parametrize(
    ("model", "body", "prefix"),
    [
        ("embedder", {"input": "a"}, "embd-"),
        ("embedder", {"input": ["a"], "encoding_format": "base64"}, "embd-"),
        ("embedder", {"input": "a", "task": "token_embed"}, "pool-"),
        ("late", {"input": "a"}, "pool-"),
        ("tagger", {"input": "a"}, "pool-"),
        ("classifier", {"input": "a"}, "classify-"),
        ("cross-encoder", {"input": "a"}, "classify-"),
        ("cross-encoder", {"query": "a", "documents": ["b"]}, "rerank-"),
        ("embedder", {"query": "a", "documents": ["b"], "text_1": "a", "text_2": "b"}, "rerank-"),
        ("embedder", {"text_1": "a", "text_2": "b"}, "score-"),
        ("embedder", {"queries": "a", "items": "b"}, "score-"),
    ],
)
async def test_the_right_endpoint_answers(model: str, body: dict[str, Any], prefix: str) -> None:
    async with serving(engine=FakeEngine(MODELS[model])) as server:
        answer = await server.post("/invocations", body)
        assert answer.json["id"].startswith(prefix), answer.json


async def test_teis_rerank_is_known_too() -> None:
    async with serving() as server:
        assert (await server.post("/invocations", {"query": "a", "texts": ["b"]})).json == [
            {"index": 0, "score": 0.5}
        ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"foo": 1}, None),
        ({}, None),
        ([], None),
        ({"input": None}, None),
        ({"query": "a"}, None),
        ({"data": 1}, "data"),
        ({"input": 5}, "input"),
        ({"query": "a", "texts": 5}, "texts"),
    ],
)
async def test_what_looks_like_nothing_is_refused(body: Any, param: str | None) -> None:
    async with serving() as server:
        assert_error(await server.post("/invocations", body), 400, "BadRequestError", param)


async def test_broken_json_is_refused() -> None:
    async with serving() as server:
        assert "not valid JSON" in assert_error(
            await server.post("/invocations", b"{"), 400, "BadRequestError"
        )
