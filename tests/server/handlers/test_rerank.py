"""POST /rerank, under three paths and in five vendors' words."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fakes import FAKE_CROSS_ENCODER, FakeEngine
from serving import Served, assert_error, serving

DOCUMENTS = ["bb", "aaaa", "cc", "a"]  # the fake scores by length: 1.5, 3.5, 1.5, 0.5
ORDER = [1, 0, 2, 3]


@pytest.fixture
async def scorer() -> AsyncIterator[Served]:
    async with serving(engine=FakeEngine(FAKE_CROSS_ENCODER)) as server:
        yield server


async def rerank(served: Served, path: str = "/rerank", **fields: Any) -> Any:
    answer = await served.post(path, {"query": "q", "documents": DOCUMENTS, **fields})
    assert answer.status == 200, answer.json
    return answer.json


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_the_answer_is_the_documented_one(scorer: Served, path: str) -> None:
    body = await rerank(scorer, path)
    assert list(body) == ["id", "model", "usage", "results", "meta"]
    assert re.fullmatch("rerank-[0-9a-f]{32}", body["id"])
    assert [result["index"] for result in body["results"]] == ORDER
    assert body["results"][0] == {"index": 1, "document": {"text": "aaaa"}, "relevance_score": 3.5}
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 20
    assert body["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 4),
        ({"top_n": 0}, 4),
        ({"top_n": None}, 4),
        ({"top_n": 2}, 2),
        ({"top_n": "3"}, 3),
        ({"top_n": 100}, 4),
        ({"top_k": 1}, 1),
        ({"top_n": 2, "top_k": 1}, 2),
    ],
)
async def test_so_many_as_asked_for(scorer: Served, fields: dict[str, Any], count: int) -> None:
    body = await rerank(scorer, **fields)
    assert [result["index"] for result in body["results"]] == ORDER[:count]


async def test_documents_can_be_left_out_of_the_answer(scorer: Served) -> None:
    assert set((await rerank(scorer, return_documents=False))["results"][0]) == {"index", "relevance_score"}
    assert "document" in (await rerank(scorer, return_documents=None))["results"][0]


async def test_documents_come_in_several_shapes(scorer: Served) -> None:
    part = {"type": "text", "text": "d"}
    for documents in ("d", ["d"], [{"text": "d"}], {"text": "d"}, {"content": [part]}, [{"content": [part]}]):
        assert (await rerank(scorer, documents=documents))["results"][0]["document"] == {"text": "d"}


async def test_so_does_the_query(scorer: Served) -> None:
    wanted = (await rerank(scorer, query="abc"))["results"]
    for query in ({"text": "abc"}, {"content": [{"type": "text", "text": "abc"}]}):
        assert (await rerank(scorer, query=query))["results"] == wanted


async def test_voyages_truncation_is_ours(scorer: Served) -> None:
    await rerank(scorer, documents=["d" * 1000], truncation=True)
    assert scorer.engine.calls[0]["tokenization"].truncate_prompt_tokens == -1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": None}, "query"),
        ({"query": ["q"]}, "query"),
        ({"query": 5}, "query"),
        ({"query": {"text": 5}}, "query"),
        ({"query": {"text": "\ud800"}}, "query"),
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", 5]}, "documents[1]"),
        ({"documents": [{"text": 5}]}, "documents[0]"),
        ({"documents": [{"text": "\ud800"}]}, "documents[0]"),
        ({"documents": ["a", "b" * 500]}, "documents[2]"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": "two"}, "top_n"),
        ({"top_n": 1.5}, "top_n"),
        ({"model": 5}, "model"),
        ({"max_tokens_per_doc": "x"}, "max_tokens_per_doc"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    ],
)
async def test_what_cannot_be_ranked_is_refused(scorer: Served, fields: dict[str, Any], param: str) -> None:
    answer = await scorer.post("/rerank", {"query": "q", "documents": DOCUMENTS, **fields})
    assert_error(answer, 400, "BadRequestError", param)


async def test_voyages_clients_find_the_results_where_they_look(scorer: Served) -> None:
    for truncation in (True, False, None):
        body = await rerank(scorer, truncation=truncation, top_k=2)
        assert body["data"] == [
            {"index": 1, "relevance_score": 3.5},
            {"index": 0, "relevance_score": 1.5},
        ]
        assert [result["document"]["text"] for result in body["results"]] == ["aaaa", "bb"]
    body = await rerank(scorer, truncation=True, top_k=1, return_documents=True)
    assert body["data"] == [{"index": 1, "relevance_score": 3.5, "document": "aaaa"}]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_n": 2, "return_documents": True, "truncation": None, "return_embeddings": False},  # Jina
        {"top_n": 2, "max_tokens_per_doc": 4096, "max_chunks_per_doc": 10, "rank_fields": None},  # Cohere
        {"top_n": 0, "truncate_prompt_tokens": -1, "truncation_side": "left", "priority": 0},  # vLLM
        {"top_n": 2, "top_k": None, "truncate": True, "truncation_direction": "Right", "raw_scores": False},
    ],
)
async def test_nobody_elses_body_is_taken_for_voyages(scorer: Served, fields: dict[str, Any]) -> None:
    assert "data" not in await rerank(scorer, **fields)


async def test_texts_are_answered_as_tei_does(scorer: Served) -> None:
    answer = await scorer.post("/rerank", {"query": "q", "texts": DOCUMENTS, "raw_scores": True})
    assert [rank["index"] for rank in answer.json] == ORDER
    assert answer.json[0] == {"index": 1, "score": 3.5}
    assert scorer.engine.calls[0]["params"].use_activation is False  # type: ignore[attr-defined]
    answer = await scorer.post(
        "/rerank",
        {
            "query": "q",
            "texts": DOCUMENTS,
            "return_text": True,
            "truncate": True,
            "truncation_direction": "Left",
        },
    )
    assert answer.json[0] == {"index": 1, "score": 3.5, "text": "aaaa"}
    tokenization: Any = scorer.engine.calls[1]["tokenization"]
    assert (tokenization.truncate_prompt_tokens, tokenization.truncation_side) == (-1, "left")
    for fields, param in (({"texts": []}, "texts"), ({"texts": [5]}, "texts[0]"), ({"texts": "a"}, "texts")):
        answer = await scorer.post("/rerank", {"query": "q", **fields})
        assert_error(answer, 400, "BadRequestError", param)


async def test_raw_scores_ask_for_infinitys_shape(scorer: Served) -> None:
    body = await rerank(scorer, raw_scores=False)
    assert list(body) == ["id", "object", "created", "model", "results", "usage"]
    assert body["object"] == "rerank"
    assert [result["index"] for result in body["results"]] == ORDER
    assert body["results"][0] == {"index": 1, "relevance_score": 3.5}
    shown = await rerank(scorer, raw_scores=True, return_documents=True, top_n=1)
    assert shown["results"] == [{"index": 1, "relevance_score": 3.5, "document": "aaaa"}]
    asked = [call["params"].use_activation for call in scorer.engine.calls]  # type: ignore[attr-defined]
    assert asked == [None, False]
