"""Call: which adapter a request rides on, by the model it names or by the task it is for, on every route; its salt,
and what its answer says that it cost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from carpool.engine.config import EngineConfig, LoraModule
from carpool.engine.errors import InputTooLong
from carpool.engine.model_info import ModelInfo
from carpool.server.config import ServerConfig
from fakes import FAKE_CLASSIFIER, FAKE_CROSS_ENCODER, FAKE_M3, FAKE_MODEL, FAKE_TASKED, FakeEngine
from serving import EMBEDDINGS, Served, assert_error, serving

MODULES = (LoraModule("mine", "/adapters/mine"),)
CONFIG = ServerConfig(engine=EngineConfig(lora_modules=MODULES), served_model_name=("base", "alias"))


@pytest.fixture
async def tasked() -> AsyncIterator[Served]:
    """A model with a task or three of its own, and one adapter of the user's."""
    async with serving(CONFIG, FakeEngine(FAKE_TASKED)) as server:
        yield server


async def call(server: Served, path: str, body: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The answer, and what the engine was asked."""
    answer = await server.post(path, body)
    assert answer.status == 200, answer.json
    return answer.json, server.engine.calls[-1]


@pytest.mark.parametrize(
    ("path", "body", "remedy"),
    [
        (EMBEDDINGS, {"input": "a"}, "truncate_prompt_tokens to -1"),
        ("/score", {"text_1": "a", "text_2": "b"}, "truncate_prompt_tokens to -1"),
        ("/v2/embed", {"texts": ["a"], "truncate": "NONE"}, "truncate to END or START"),
        ("/embed", {"inputs": "a"}, "truncate to true"),
        ("/rerank", {"query": "a", "texts": ["b"]}, "truncate to true"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, "truncate to true"),
    ],
)
async def test_what_is_too_long_is_told_the_word_that_works_there(
    served: Served, path: str, body: dict[str, Any], remedy: str
) -> None:
    served.engine.error = InputTooLong(f"Too long; set {InputTooLong.REMEDY}.")
    answer = await served.post(path, body)
    assert assert_error(answer, 400, "BadRequestError") == f"Too long; set {remedy}."


# ── by the model's name ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBEDDINGS, {"input": "a"}),
        ("/pooling", {"input": "a"}),
        ("/v2/embed", {"texts": ["a"]}),
        ("/embed", {"inputs": "a"}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/rerank", {"query": "a", "documents": ["b"]}),
        ("/rerank", {"query": "a", "texts": ["b"]}),
        ("/invocations", {"input": "a"}),
    ],
)
async def test_an_adapter_is_a_model_by_its_name(tasked: Served, path: str, body: dict[str, Any]) -> None:
    answer, asked = await call(tasked, path, {**body, "model": "mine"})
    assert asked["adapter"] == "mine"
    if isinstance(answer, dict) and "model" in answer:
        assert answer["model"] == "mine"
    answer, asked = await call(tasked, path, {**body, "model": "alias"})
    assert asked["adapter"] is None
    if isinstance(answer, dict) and "model" in answer:
        assert answer["model"] == "base"


async def test_so_it_is_for_a_classifier() -> None:
    model = replace(FAKE_CLASSIFIER, adapters={"mine": 1}, lora_modules={"mine": "/adapters/mine"})
    async with serving(CONFIG, FakeEngine(model)) as server:
        answer, asked = await call(server, "/classify", {"input": "a", "model": "mine"})
        assert (answer["model"], asked["adapter"]) == ("mine", "mine")
        _, asked = await call(server, "/predict", {"inputs": "a", "model": "mine"})
        assert asked["adapter"] == "mine"


async def test_an_unknown_model_is_still_unknown(tasked: Served) -> None:
    assert_error(await tasked.embed(input="a", model="theirs"), 404, "NotFoundError", "model")


async def test_each_adapter_has_a_card(tasked: Served) -> None:
    cards = (await tasked.get("/v1/models")).json["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("base", "/models/fake", None),
        ("alias", "/models/fake", None),
        ("mine", "/adapters/mine", "base"),
    ]
    assert cards[0]["adapter_tasks"] == ["retrieval.passage", "retrieval.query", "separation"]
    assert "adapter_tasks" not in cards[2]
    assert (await tasked.get("/v1/models/mine")).json["parent"] == "base"


async def test_info_tells_all_of_them(tasked: Served) -> None:
    info = (await tasked.get("/info")).json
    assert info["lora_modules"] == {"mine": "/adapters/mine"}
    assert info["adapter_tasks"] == ["retrieval.passage", "retrieval.query", "separation"]
    assert info["default_adapter"] == "separation"


# ── by the task ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "adapter", "prompt"),
    [
        (EMBEDDINGS, {"input": "a", "task": "retrieval.query"}, "retrieval.query", "Q: a"),
        (EMBEDDINGS, {"input": ["a"], "task": "separation"}, "separation", "a"),
        (EMBEDDINGS, {"input": "a"}, None, "a"),
        ("/pooling", {"input": "a", "task": "retrieval.passage"}, "retrieval.passage", "P: a"),
        ("/pooling", {"input": "a", "task": "embed"}, None, "a"),
        ("/invocations", {"input": "a", "task": "retrieval.query"}, "retrieval.query", "Q: a"),
        ("/v2/embed", {"texts": ["a"], "input_type": "search_query"}, "retrieval.query", "Q: a"),
        ("/v2/embed", {"texts": ["a"], "input_type": "search_document"}, "retrieval.passage", "P: a"),
        ("/v2/embed", {"texts": ["a"], "input_type": "clustering"}, "separation", "a"),
        ("/v2/embed", {"texts": ["a"], "input_type": "retrieval.query"}, "retrieval.query", "Q: a"),
        ("/v2/embed", {"texts": ["a"], "input_type": "other"}, None, "O: a"),
        ("/embed", {"inputs": "a", "prompt_name": "retrieval.query"}, "retrieval.query", "Q: a"),
        ("/embed", {"inputs": "a", "prompt_name": "other"}, None, "O: a"),
    ],
)
async def test_a_task_is_an_adapter_and_an_instruction(
    tasked: Served, path: str, body: dict[str, Any], adapter: str | None, prompt: str
) -> None:
    _, asked = await call(tasked, path, body)
    assert (asked["adapter"], asked["prompts"], asked["task"]) == (adapter, [prompt], "embed")


async def test_a_task_of_tokens_can_be_asked_for_by_its_own_name(tasked: Served) -> None:
    _, asked = await call(tasked, "/pooling", {"input": "a", "task": "token_embed"})
    assert (asked["adapter"], asked["task"]) == (None, "token_embed")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EMBEDDINGS, {"input": "a", "task": "cooking"}, "task"),
        (EMBEDDINGS, {"input": "a", "task": ""}, "task"),
        ("/pooling", {"input": "a", "task": "cooking"}, "task"),
        ("/invocations", {"input": "a", "task": "cooking"}, "task"),
        ("/v2/embed", {"texts": ["a"], "input_type": "cooking"}, "input_type"),
        ("/embed", {"inputs": "a", "prompt_name": "cooking"}, "prompt_name"),
    ],
)
async def test_an_unknown_task_is_refused(
    tasked: Served, path: str, body: dict[str, Any], param: str
) -> None:
    assert_error(await tasked.post(path, body), 400, "BadRequestError", param)


async def test_the_refusal_lists_the_known(tasked: Served) -> None:
    message = assert_error(await tasked.embed(input="a", task="cooking"), 400, "BadRequestError", "task")
    assert message.endswith("Supported values: retrieval.passage, retrieval.query, separation.")


async def test_a_task_and_an_adapter_do_not_go_together(tasked: Served) -> None:
    message = assert_error(
        await tasked.embed(input="a", task="separation", model="mine"), 400, "BadRequestError", "task"
    )
    assert "mine has no tasks" in message


async def test_an_instruction_goes_with_texts_only(tasked: Served) -> None:
    assert_error(await tasked.embed(input=[5, 6], task="retrieval.query"), 400, "BadRequestError", "task")
    _, asked = await call(tasked, EMBEDDINGS, {"input": [5, 6], "task": "separation"})
    assert (asked["adapter"], asked["prompts"]) == ("separation", [[5, 6]])


async def test_a_task_is_no_chat_message(tasked: Served) -> None:
    """Where the model has a chat template, other instructions are."""
    tasked.engine._model = replace(FAKE_TASKED, chat_template=True)
    _, asked = await call(tasked, "/v2/embed", {"texts": ["a"], "input_type": "search_query"})
    assert asked["prompts"] == ["Q: a"]
    _, asked = await call(tasked, "/v2/embed", {"texts": ["a"], "input_type": "other"})
    assert asked["prompts"] == ["<system>O: <user>a"]


async def test_models_without_tasks_ignore_the_word(served: Served) -> None:
    """Jina's clients send it to any model."""
    _, asked = await call(served, EMBEDDINGS, {"input": "a", "task": "text-matching"})
    assert (asked["adapter"], asked["prompts"]) == (None, ["a"])


# ── what is shared, and what that spared ─────────────────────────────────────────────────────────────────────

WITH_USAGE = [
    (FAKE_MODEL, EMBEDDINGS, {"input": ["a", "b"]}),
    (FAKE_MODEL, "/pooling", {"input": ["a", "b"]}),
    (FAKE_M3, "/pooling", {"input": ["a", "b"], "task": "embed&token_embed"}),
    (FAKE_CLASSIFIER, "/classify", {"input": ["a", "b"]}),
    (FAKE_CROSS_ENCODER, "/score", {"text_1": "a", "text_2": "b"}),
    (FAKE_MODEL, "/rerank", {"query": "a", "documents": ["b"]}),
    (FAKE_MODEL, "/invocations", {"input": ["a", "b"]}),
]
WITHOUT = [
    (FAKE_MODEL, "/v2/embed", {"texts": ["a"]}),
    (FAKE_MODEL, "/embed", {"inputs": "a"}),
    (FAKE_MODEL, "/embed_all", {"inputs": "a"}),
    (FAKE_M3, "/embed_sparse", {"inputs": "a"}),
    (FAKE_CLASSIFIER, "/predict", {"inputs": "a"}),
    (FAKE_MODEL, "/rerank", {"query": "a", "texts": ["b"]}),
]


@pytest.mark.parametrize(("model", "path", "body"), WITH_USAGE + WITHOUT)
async def test_a_salt_goes_to_the_engine_from_everywhere(
    model: ModelInfo, path: str, body: dict[str, Any]
) -> None:
    async with serving(engine=FakeEngine(model)) as server:
        _, asked = await call(server, path, {**body, "cache_salt": "mine"})
        assert asked["cache_salt"] == "mine"
        _, asked = await call(server, path, body)
        assert asked["cache_salt"] is None
        refused = await server.post(path, {**body, "cache_salt": "mi/ne"})
        assert_error(refused, 400, "BadRequestError", "cache_salt")


@pytest.mark.parametrize(("model", "path", "body"), WITH_USAGE)
async def test_usage_tells_what_the_cache_spared_where_it_is_to(
    model: ModelInfo, path: str, body: dict[str, Any]
) -> None:
    """Both prompts of each body had one token in the cache."""
    for told, cached, details in (
        (True, 1, {"cached_tokens": 2}),
        (True, 0, {"cached_tokens": 0}),
        (False, 1, None),
    ):
        engine = FakeEngine(model)
        engine.cached = cached
        async with serving(ServerConfig(enable_prompt_tokens_details=told), engine) as server:
            answer, _ = await call(server, path, body)
            assert answer["usage"]["prompt_tokens_details"] == details
            assert answer["usage"]["prompt_tokens"] == 6
