"""Rerankers over HTTP: every route gives what `LLM.score` does, in the model's own prompt and with an instruction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import tiny_heads
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import EngineConfig
from carpool.engine.llm import LLM
from serving import Served, assert_error, serving
from zoo import heads
from zoo import rerankers as zoo

QUERY = "where is the cat?"
DOCUMENTS = ["the cat sat on a mat", "rain in spain", "", "the cat sat on a mat"]
RANKING = {"query": QUERY, "documents": DOCUMENTS}


@asynccontextmanager
async def served(make: Callable[[Path], Any], folder: Path) -> AsyncIterator[Served]:
    """A server of this process around a real engine."""
    make(folder)
    engine: Any = AsyncEngine(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1))
    await engine.start()
    async with serving(engine=engine) as server:
        yield server
    await engine.stop(1.0)


def by_document(answer: dict[str, Any]) -> list[float]:
    """Scores of a ranking, in the documents' order."""
    ranked = [result["relevance_score"] for result in answer["results"]]
    assert ranked == sorted(ranked, reverse=True)
    return [result["relevance_score"] for result in sorted(answer["results"], key=lambda each: each["index"])]


@pytest.mark.parametrize("listwise", [True, False])
async def test_every_route_gives_the_same_scores_with_and_without_an_instruction(
    listwise: bool, tmp_path: Path
) -> None:
    async with served(zoo.jina_v3 if listwise else zoo.qwen3, tmp_path) as server:
        llm = await asyncio.to_thread(LLM, str(tmp_path), dtype="float32", cpu_workers=1)
        seen = []
        for asked in ({}, {"instruction": "find rain"}):
            answers = await asyncio.to_thread(
                llm.score, QUERY, DOCUMENTS, use_tqdm=False, chat_template_kwargs=asked
            )
            expected = [answer.outputs.score for answer in answers]
            prompts = [answer.prompt_token_ids for answer in answers]
            tokens = len(prompts[0]) if listwise else sum(map(len, prompts))
            for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
                answer = (await server.post(route, RANKING | asked)).json
                assert by_document(answer) == pytest.approx(expected, abs=1e-5)
                assert answer["usage"]["prompt_tokens"] == tokens
            scored = (await server.post("/score", {"text_1": QUERY, "text_2": DOCUMENTS, **asked})).json
            assert [item["score"] for item in scored["data"]] == pytest.approx(expected, abs=1e-5)
            assert scored["usage"]["prompt_tokens"] == tokens
            seen.append(expected)
        await asyncio.to_thread(llm.close)
        assert seen[0] != pytest.approx(seen[1], abs=1e-4)
        assert (seen[0][0] == pytest.approx(seen[0][3], abs=1e-6)) is not listwise  # equal documents


async def test_what_a_listwise_reranker_does_with_a_request(tmp_path: Path) -> None:
    async with served(zoo.jina_v3, tmp_path) as server:
        info = (await server.get("/info")).json
        assert (info["score_type"], info["notices"]) == ("listwise", [])

        whole = (await server.post("/rerank", RANKING)).json
        best = (await server.post("/rerank", {**RANKING, "top_n": 2})).json  # of the whole list
        assert best["results"] == whole["results"][:2]

        teis = (await server.post("/rerank", {"query": QUERY, "texts": DOCUMENTS})).json
        assert [item["score"] for item in teis] == pytest.approx(
            [result["relevance_score"] for result in whole["results"]], abs=1e-5
        )

        pairs = [(QUERY, DOCUMENTS[0]), ("rain?", DOCUMENTS[1])]
        alone = [(await server.post("/score", {"text_1": q, "text_2": d})).json for q, d in pairs]
        both = (await server.post("/score", {"text_1": [QUERY, "rain?"], "text_2": DOCUMENTS[:2]})).json
        expected = [answer["data"][0]["score"] for answer in alone]  # a prompt each
        assert [item["score"] for item in both["data"]] == pytest.approx(expected, abs=1e-5)
        assert both["usage"]["prompt_tokens"] == sum(answer["usage"]["prompt_tokens"] for answer in alone)

        refused = await server.post("/rerank", {**RANKING, "truncate_prompt_tokens": 9})
        assert "leaves no room" in assert_error(refused, 400, "BadRequestError", "truncate_prompt_tokens")


async def test_a_language_model_that_nobody_knows_how_to_ask_says_so_and_reads_both_texts(
    tmp_path: Path,
) -> None:
    async with served(tiny_heads.qwen2_cross, tmp_path) as server:
        (notice,) = [text for text in (await server.get("/info")).json["notices"] if "No prompt" in text]
        assert "may mean nothing" in notice
        assert "--chat-template" in notice
        score = (await server.post("/score", {"text_1": "a cat", "text_2": "on a mat"})).json
        counts = [
            (await server.post("/tokenize", {"prompt": text})).json["count"] for text in ("a cat", "on a mat")
        ]
        assert score["usage"]["prompt_tokens"] == sum(counts)
        ranked = (await server.post("/rerank", {"query": "a cat", "documents": ["on a mat"]})).json
        assert ranked["results"][0]["relevance_score"] == score["data"][0]["score"]
        pair = await server.post("/predict", {"inputs": [["a cat", "on a mat"]]})
        assert pair.json[0][0]["score"] == pytest.approx(score["data"][0]["score"])


async def test_a_colberts_vectors_of_queries_and_documents_make_the_scores(tmp_path: Path) -> None:
    """Clients index documents by /pooling and compare by themselves."""
    query, documents = "where, where is the cat?", ["the cat sat on a mat.", "rain (in) spain!", "!"]
    async with served(partial(heads.colbert_v2, mask_punctuation=True), tmp_path) as server:

        async def vectors(texts: list[str], input_type: str | None) -> tuple[list[Any], int]:
            body = {"input": texts, "task": "token_embed", "input_type": input_type}
            answer = (await server.post("/pooling", body)).json
            return [np.array(item["data"]) for item in answer["data"]], answer["usage"]["prompt_tokens"]

        (asked,), asked_tokens = await vectors([query], "query")
        told, told_tokens = await vectors(documents, "document")
        answer = (await server.post("/score", {"queries": query, "documents": documents})).json
        found = [(asked @ document.T).max(axis=1).sum() for document in told]
        assert found == pytest.approx([item["score"] for item in answer["data"]], abs=1e-4)
        assert asked_tokens + told_tokens == answer["usage"]["prompt_tokens"]
        assert sum(map(len, told)) < told_tokens  # punctuation is run, and left out
        bare, bare_tokens = await vectors(documents, None)
        assert sum(map(len, bare)) == bare_tokens == told_tokens - len(documents)
        for wrong in ({"input_type": "passage"}, {"input_type": "query", "input": [5, 6]}):
            refused = await server.post("/pooling", {"input": "a", **wrong})
            assert_error(refused, 400, "BadRequestError", "input_type")
    async with served(tiny.bert, tmp_path / "other") as server:
        answers = [
            (
                await server.post("/pooling", {"input": "a cat", "task": "token_embed", "input_type": each})
            ).json
            for each in (None, "query", "document", "passage")
        ]
        assert len({str(answer["data"]) for answer in answers}) == 1
