"""POST /invocations: what the body looks like says what is meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from carpool.server.config import ServerConfig
from fakes import FAKE_MODEL, FAKES, FakeEngine
from serving import assert_error, serving

MODELS = {
    **FAKES,
    "late": replace(FAKE_MODEL, default_task="token_embed"),
    "sparse": replace(FAKES["m3"], default_task="sparse_embed"),
}


@pytest.mark.parametrize(
    ("model", "body", "prefix"),
    [
        ("embedder", {"input": "a"}, "embd-"),
        ("embedder", {"input": ["a"], "encoding_format": "base64"}, "embd-"),
        ("embedder", {"input": "a", "task": "token_embed"}, "pool-"),
        ("embedder", {"input": "a", "task": "embed"}, "embd-"),
        ("classifier", {"input": "a", "task": "classify"}, "classify-"),
        ("classifier", {"input": "a", "task": "token_classify"}, "pool-"),
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


@pytest.mark.parametrize(
    "body", [{"input": "a"}, {"input": "a", "model": "unheard"}, {"query": "a", "texts": ["b"]}]
)
async def test_the_platforms_header_names_the_adapter(body: dict[str, Any]) -> None:
    async with serving(ServerConfig(served_model_name=("known",))) as server:
        for name, status in (("known", 200), ("missing", 404)):
            headers = {"X-Amzn-SageMaker-Adapter-Identifier": name}
            assert (await server.post("/invocations", body, headers=headers)).status == status


async def test_teis_rerank_is_known_too() -> None:
    async with serving() as server:
        assert (await server.post("/invocations", {"query": "a", "texts": ["b"]})).json == [
            {"index": 0, "score": 0.5}
        ]


@pytest.mark.parametrize("path", ["/invocations", "/"])
@pytest.mark.parametrize(
    ("model", "body", "endpoint"),
    [
        ("embedder", {"inputs": "a"}, "/embed"),
        ("embedder", {"inputs": ["a", "b"], "normalize": False}, "/embed"),
        ("late", {"inputs": "a"}, "/embed_all"),
        ("sparse", {"inputs": "a"}, "/embed_sparse"),
        ("classifier", {"inputs": "a"}, "/predict"),
        ("classifier", {"inputs": "a", "parameters": {"top_k": 1}}, "/predict"),
        ("cross-encoder", {"inputs": ["a", "b"]}, "/predict"),
        ("cross-encoder", {"inputs": {"text": "a", "text_pair": "b"}}, "/predict"),
        ("classifier", {"inputs": ["a", "b", "c"], "parameters": {}}, "/predict"),
        ("cross-encoder", {"query": "a", "texts": ["b"]}, "/rerank"),
        ("embedder", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, "/similarity"),
    ],
)
async def test_teis_inputs_are_for_what_the_model_does_first(
    path: str, model: str, body: dict[str, Any], endpoint: str
) -> None:
    async with serving(engine=FakeEngine(MODELS[model])) as server:
        answer = await server.post(path, body)
        assert answer.status == 200, answer.json
        assert answer.json == (await server.post(endpoint, body)).json


async def test_a_tagger_has_no_endpoint_of_teis() -> None:
    async with serving(engine=FakeEngine(MODELS["tagger"])) as server:
        assert_error(await server.post("/", {"inputs": "a"}), 400, "BadRequestError")


async def test_the_front_page_needs_no_key_and_its_other_side_does() -> None:
    async with serving(ServerConfig(api_key=("secret",))) as server:
        assert (await server.get("/")).status == 200
        assert_error(await server.post("/", {"inputs": "a"}), 401, "AuthenticationError")


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
