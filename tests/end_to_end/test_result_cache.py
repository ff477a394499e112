"""Kept results over HTTP: a real model's answers, given again byte for byte; told in metrics and /info."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

import tiny
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import EngineConfig
from carpool.engine.params import PoolingParams, Task, TokenizationParams
from carpool.server.config import ServerConfig
from serving import Served, serving


@dataclass
class Rode:
    """An observer that counts what is run."""

    sequences: int = 0

    def batch_done(self, tokens: int, sequences: int, forward_seconds: float) -> None:
        self.sequences += sequences

    def sequences_cancelled(self, count: int) -> None:
        raise AssertionError("nobody left")


@asynccontextmanager
async def engine_of(folder: Path, rode: Rode | None = None, **options: Any) -> AsyncIterator[AsyncEngine]:
    tiny.bert(folder)
    engine = AsyncEngine(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1, **options))
    if rode is not None:
        engine.observer = rode
    await engine.start()
    yield engine
    await engine.stop(1.0)


async def series(server: Served) -> dict[str, float]:
    text = (await server.get("/metrics")).body.decode()
    return {
        sample.name.removeprefix("carpool_result_cache_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "result_cache" in sample.name
    }


async def test_an_answer_is_given_again_byte_for_byte(tmp_path: Path) -> None:
    body: dict[str, Any] = {"input": ["the cat sat", "on a mat"]}
    async with engine_of(tmp_path, cache_size=1 << 20) as engine:
        fake: Any = engine
        async with serving(ServerConfig(engine=engine.config), fake) as server:
            first = (await server.embed(**body)).json
            again = (await server.embed(**body)).json
            assert again["data"] == first["data"]
            assert again["usage"] == first["usage"]
            told = await series(server)
            assert (told["hits_total"], told["misses_total"]) == (2, 2)
            assert 0 < told["bytes"] <= 1 << 20
            assert (await server.get("/info")).json["result_cache_bytes"] == 1 << 20
            other = (await server.embed(**body, cache_salt="mine")).json
            np.testing.assert_allclose(
                other["data"][0]["embedding"], first["data"][0]["embedding"], rtol=0, atol=1e-6
            )
            assert (await series(server))["hits_total"] == 2, "under another salt it was run anew"


async def test_kept_rows_are_those_of_a_run_in_every_task_type_and_width(tmp_path: Path) -> None:
    """And many at once are run once: the same rows, of an engine that keeps none and of one that does."""
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7]]
    kinds: list[tuple[Task | tuple[Task, ...], PoolingParams]] = [
        ("embed", PoolingParams()),
        ("embed", PoolingParams(embed_dtype="float16")),
        ("embed", PoolingParams(embed_dtype="bfloat16")),
        ("embed", PoolingParams(use_activation=False)),
        ("token_embed", PoolingParams()),
        (("embed", "token_embed"), PoolingParams()),
    ]
    rows = []
    for size in (0, 1 << 20):
        rode = Rode()
        async with engine_of(tmp_path, rode, cache_size=size) as engine:
            for task, params in kinds:
                calls = [engine.pool(prompts, params, TokenizationParams(), task=task) for _ in range(3)]
                rows += [[result.rows for result in await asyncio.gather(*calls)]]
                alone = await engine.pool(prompts, params, TokenizationParams(), task=task)
                rows[-1].append(alone.rows)
            # Of two distinct prompts: a row for each of five kinds, and two for the last, which are those of the first
            # and the fifth. Where nothing is kept, all of it is run for the three together and for the one alone.
            assert rode.sequences == (10 if size else 2 * 14)
    for off, on in zip(rows[: len(kinds)], rows[len(kinds) :], strict=True):
        for result in (*off, *on):
            for row, expected in zip(result, off[0], strict=True):
                assert row.dtype == expected.dtype
                np.testing.assert_allclose(
                    row.astype(np.float32), expected.astype(np.float32), rtol=0, atol=1e-6
                )
        for result in on:
            assert all(row.tobytes() == same.tobytes() for row, same in zip(result, on[0], strict=True))
