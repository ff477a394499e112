"""POST /score: four pairs of names, three shapes, one number a pair."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from carpool.engine.params import PoolingParams, TokenizationParams
from fakes import FAKE_CLASSIFIER, FAKE_CROSS_ENCODER, FakeEngine
from serving import Served, assert_error, serving

NAMES = [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]


@pytest.fixture
async def scorer() -> AsyncIterator[Served]:
    async with serving(engine=FakeEngine(FAKE_CROSS_ENCODER)) as server:
        yield server


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_the_answer_is_the_documented_one(scorer: Served, path: str) -> None:
    body = (await scorer.post(path, {"text_1": "ab", "text_2": ["ab", "abc"]})).json
    assert list(body) == ["id", "object", "created", "model", "data", "usage"]
    assert re.fullmatch("score-[0-9a-f]{32}", body["id"])
    assert body["data"] == [
        {"index": 0, "object": "score", "score": 2.0},
        {"index": 1, "object": "score", "score": 2.5},
    ]
    assert set(body["usage"]) == {
        "prompt_tokens",
        "total_tokens",
        "completion_tokens",
        "prompt_tokens_details",
    }


@pytest.mark.parametrize(("first", "second"), NAMES)
async def test_all_four_pairs_of_names_are_known(scorer: Served, first: str, second: str) -> None:
    assert (await scorer.post("/score", {first: "a", second: "bc"})).json["data"][0]["score"] == 1.5
    answer = await scorer.post("/score", {first: "a", second: ["b", "c" * 500]})
    assert_error(answer, 400, "BadRequestError", f"{second}[2]")
    assert_error(await scorer.post("/score", {first: "a", second: []}), 400, "BadRequestError", second)
    assert_error(await scorer.post("/score", {first: [], second: "a"}), 400, "BadRequestError", first)
    assert_error(await scorer.post("/score", {first: "a"}), 400, "BadRequestError", PARTNER[first])


PARTNER = {"queries": "documents", "data_1": "data_2", "text_1": "text_2"}


async def test_the_first_complete_pair_counts(scorer: Served) -> None:
    await scorer.post(
        "/score", {"text_1": "a", "text_2": "b", "queries": "c", "documents": "d", "items": None}
    )
    assert scorer.engine.calls[0]["queries"] == ["c"]
    answer = await scorer.post("/score", {"text_1": "a", "documents": ["b"]})
    assert_error(answer, 400, "BadRequestError", "queries")
    assert_error(await scorer.post("/score", {}), 400, "BadRequestError", "text_1")


async def test_objects_with_text_parts_are_texts(scorer: Served) -> None:
    part = {"type": "text", "text": "x"}
    asked = {"text_1": {"content": [part, part]}, "text_2": ["a", {"content": [part]}]}
    await scorer.post("/score", {"text_1": "q", **asked})
    [call] = scorer.engine.calls
    assert (call["queries"], call["documents"]) == (["x\nx"], ["a", "x"])


@pytest.mark.parametrize(
    ("item", "param"),
    [
        (5, "text_2"),
        ([5], "text_2[0]"),
        ([["a"]], "text_2[0]"),
        ([None], "text_2[0]"),
        ([{"text": "a"}], "text_2[0]"),
        ({"content": []}, "text_2"),
        ({"content": "a"}, "text_2"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "text_2.content[0]"),
        ({"content": [{"type": "text", "text": 5}]}, "text_2.content[0]"),
        ({"content": [5]}, "text_2.content[0]"),
        ("\ud800", "text_2"),
        ({"content": [{"type": "text", "text": "\ud800"}]}, "text_2"),
    ],
)
async def test_what_is_no_text_is_refused(scorer: Served, item: Any, param: str) -> None:
    answer = await scorer.post("/score", {"text_1": "a", "text_2": item})
    assert_error(answer, 400, "BadRequestError", param)


@pytest.mark.parametrize("sides", [(["a", "b"], "c"), (["a", "b"], ["c", "d", "e"])])
async def test_lengths_must_match(scorer: Served, sides: Any) -> None:
    answer = await scorer.post("/score", {"text_1": sides[0], "text_2": sides[1]})
    assert assert_error(answer, 400, "BadRequestError") == "Input lengths must be either 1:1, 1:N or N:N"


async def test_what_was_asked_reaches_the_engine(scorer: Served) -> None:
    await scorer.post(
        "/score",
        {
            "text_1": "a",
            "text_2": "b",
            "activation": False,
            "truncate_prompt_tokens": -1,
            "max_tokens_per_query": "3",
            "max_tokens_per_doc": 4,
            "instruction": "find",
            "chat_template_kwargs": {"extra": 1},
            "priority": 2,
        },
    )
    [call] = scorer.engine.calls
    assert call["params"] == PoolingParams(activation=False)
    assert call["tokenization"] == TokenizationParams(
        truncate_prompt_tokens=-1, max_tokens_per_query=3, max_tokens_per_doc=4
    )
    assert call["template_kwargs"] == {"instruction": "find", "extra": 1}
    assert call["priority"] == 2
    await scorer.post(
        "/score",
        {"text_1": "a", "text_2": "b", "instruction": "x", "chat_template_kwargs": {"instruction": "y"}},
    )
    assert scorer.engine.calls[1]["template_kwargs"] == {"instruction": "y"}


async def test_models_that_cannot_say_so(served: Served) -> None:
    async with serving(engine=FakeEngine(FAKE_CLASSIFIER)) as server:
        answer = await server.post("/score", {"text_1": "a", "text_2": "b"})
        assert assert_error(answer, 400, "BadRequestError") == "The model does not support Score API"
        answer = await server.post("/rerank", {"query": "a", "documents": ["b"]})
        assert assert_error(answer, 400, "BadRequestError") == "The model does not support Rerank API"
    assert (await served.post("/score", {"text_1": "a", "text_2": "b"})).status == 200  # a bi-encoder


async def test_a_score_that_is_no_number_never_leaves(
    scorer: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scorer.engine.score

    async def broken(*args: Any, **options: Any) -> Any:
        result = await real(*args, **options)
        result.scores[0] = float("nan")
        return result

    monkeypatch.setattr(scorer.engine, "score", broken)
    answer = await scorer.post("/score", {"text_1": "a", "text_2": "b"})
    assert_error(answer, 500, "InternalServerError")
