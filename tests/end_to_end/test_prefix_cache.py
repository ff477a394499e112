"""The prefix cache over HTTP: what a real model finds, in usage, metrics and /info, and who shares with whom."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import tiny
import tiny_heads
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import EngineConfig
from carpool.server.config import ServerConfig
from serving import Served, serving

IDS = list(range(1, 40))
WHOLE = len(IDS) // 16 * 16  # tokens in full blocks


@asynccontextmanager
async def served(make: Callable[[Path], None], folder: Path, **options: Any) -> AsyncIterator[Served]:
    """A server of this process around a real engine, which tells what its cache spared."""
    make(folder)
    engine: Any = AsyncEngine(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1, **options))
    await engine.start()
    async with serving(ServerConfig(enable_prompt_tokens_details=True), engine) as server:
        yield server
    await engine.stop(1.0)


async def embed(server: Served, ids: list[int], **fields: Any) -> tuple[Any, int]:
    """The vector, and how many of the ids were found."""
    answer = (await server.embed(input=ids, **fields)).json
    assert answer["usage"]["prompt_tokens"] == len(ids)
    return answer["data"][0]["embedding"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


async def cache_series(server: Served) -> dict[str, float]:
    text = (await server.get("/metrics")).body.decode()
    return {
        sample.name.removeprefix("carpool_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "cache" in sample.name
    }


async def test_usage_metrics_and_info_tell_what_was_found(tmp_path: Path) -> None:
    async with served(tiny.qwen3, tmp_path) as server:
        info = (await server.get("/info")).json
        assert (info["prefix_caching"], info["chunked_prefill"]) == (True, True)
        assert info["kv_cache_tokens"] >= info["limits"]["max_model_len"]
        first, found = await embed(server, IDS)
        assert found == 0
        again, found = await embed(server, IDS)
        assert found == WHOLE
        np.testing.assert_allclose(again, first, rtol=0, atol=1e-5)
        assert await cache_series(server) == {
            "prefix_cache_queried_tokens_total": 2 * len(IDS),
            "prefix_cache_hit_tokens_total": WHOLE,
            "kv_cache_used_ratio": 0,
        }


async def test_only_those_of_one_salt_share(tmp_path: Path) -> None:
    async with served(tiny.qwen3, tmp_path) as server:
        plain, _ = await embed(server, IDS)
        for salt in ("one", "other"):
            salted, found = await embed(server, IDS, cache_salt=salt)
            assert found == 0
            np.testing.assert_allclose(salted, plain, rtol=0, atol=1e-5)
            assert (await embed(server, IDS, cache_salt=salt))[1] == WHOLE


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny.bert, {}), (tiny.qwen3, {"enable_prefix_caching": False, "enable_chunked_prefill": False})],
)
async def test_without_a_cache_nothing_is_found_and_nothing_counted(
    make: Callable[[Path], None], options: dict[str, Any], tmp_path: Path
) -> None:
    async with served(make, tmp_path, **options) as server:
        for _ in range(2):
            assert (await embed(server, IDS))[1] == 0
        assert await cache_series(server) == {}
        info = (await server.get("/info")).json
        assert (info["prefix_caching"], info["chunked_prefill"], info["kv_cache_tokens"]) == (False, False, 0)


@pytest.mark.parametrize("path", ["/score", "/rerank"])
async def test_documents_share_the_query_before_them(path: str, tmp_path: Path) -> None:
    """Of one request: what the first pair computes, the others find."""
    query, documents = "the cat sat on a mat, " * 3, ["rain in spain", "ice cream", "a mat"]
    async with served(tiny_heads.qwen2_cross, tmp_path, hf_overrides={"use_sep_token": False}) as server:
        prompts = [
            (await server.post("/tokenize", {"prompt": query + text})).json["tokens"] for text in documents
        ]
        differs = next(place for place, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
        shared = differs // 16 * 16
        assert shared > 0
        body = {"query": query, "queries": query, "documents": documents}
        usage = (await server.post(path, body)).json["usage"]
        assert usage["prompt_tokens"] == sum(map(len, prompts))
        assert usage["prompt_tokens_details"]["cached_tokens"] == 2 * shared
