"""Chunks and shared prefixes through the whole engine: the numbers of a cold run, and all that is said of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import InputTooLong
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import PoolingParams, Task, TokenizationParams
from carpool.engine.terms import Terms
from tiny_adapters import write_lora

Checkpoint = Callable[[str], Path]
OFF: dict[str, Any] = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
SMALL: dict[str, Any] = {"long_prefill_token_threshold": 16, "max_num_batched_tokens": 32}
BEGINNING = list(range(5, 45))


@asynccontextmanager
async def engine_of(folder: Path, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(model=str(folder), dtype="float32", **options))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(10)


async def ask(
    engine: AsyncEngine, prompts: list[list[int]], task: Task = "embed", **terms: Any
) -> PoolingResult:
    return await engine.pool(prompts, PoolingParams(), TokenizationParams(), Terms(**terms), task=task)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("task", ["embed", "token_embed"])
async def test_results_are_those_of_a_cold_run(family: str, task: Task, checkpoint: Checkpoint) -> None:
    prompts = [BEGINNING[: 3 * i] + [50 + i] * (1 + i % 9) for i in range(12)] + [list(range(5, 60))]
    options: dict[str, Any] = {"pooler_config": PoolerConfig(pooling_type="LAST")}
    async with engine_of(checkpoint(family), **OFF, **options) as engine:
        cold = (await ask(engine, prompts, task)).rows
    async with engine_of(checkpoint(family), **SMALL, **options) as engine:
        for _ in range(2):
            warm = (await ask(engine, prompts, task)).rows
            for one, other in zip(warm, cold, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
        many = await asyncio.gather(*(ask(engine, [ids], task) for ids in prompts))
        for result, other in zip(many, cold, strict=True):
            np.testing.assert_allclose(result.rows[0], other, atol=1e-5)
        stats = engine.cache_stats
        assert stats is not None
        assert (stats.hit_tokens > 0) == (task == "embed")
        assert stats.used_blocks == 0, "nothing is held once all is answered"


async def test_what_was_found_is_told(checkpoint: Checkpoint) -> None:
    async with engine_of(checkpoint("qwen3")) as engine:
        assert (await ask(engine, [[*BEGINNING, 1]])).cached_tokens == 0
        assert (await ask(engine, [[*BEGINNING, 2], [*BEGINNING, 3]])).cached_tokens == 64
        assert (await ask(engine, [BEGINNING[:16]])).cached_tokens == 0, "its last token is its own"
        assert (await ask(engine, [[*BEGINNING, 4]], "token_embed")).cached_tokens == 0
        salted = [(await ask(engine, [BEGINNING], cache_salt="mine")).cached_tokens for _ in range(2)]
        assert salted == [0, 32]
        stats = engine.cache_stats
        assert stats is not None
        assert stats.hit_tokens == 64 + 32
    async with engine_of(checkpoint("bert")) as engine:
        assert engine.cache_stats is None


async def test_documents_of_one_query_compute_it_once(checkpoint: Checkpoint) -> None:
    async with engine_of(checkpoint("qwen3"), cpu_workers=1) as engine:
        await ask(engine, [[7]])
        result = await ask(engine, [[*BEGINNING, 100 + i] for i in range(10)])
        assert result.cached_tokens == 9 * 32, "none of it had been asked before"


async def test_a_prompt_that_neither_a_batch_nor_the_cache_holds_is_refused(checkpoint: Checkpoint) -> None:
    async with engine_of(checkpoint("qwen3"), **SMALL, kv_cache_memory_bytes=1 << 14) as engine:
        held = engine.model.kv_cache_tokens
        assert 32 < held < engine.model.max_model_len
        assert len((await ask(engine, [[9] * held])).rows) == 1
        with pytest.raises(
            InputTooLong, match=f"takes 32, and the cache of keys and values holds {held}"
        ) as e:
            await ask(engine, [[9], [9] * (held + 1)])
        assert e.value.param == "input[1]"


async def test_a_prompt_of_all_that_the_model_takes_works(checkpoint: Checkpoint) -> None:
    async with engine_of(checkpoint("qwen3"), **SMALL) as engine:
        longest = engine.model.max_model_len
        rows = (await ask(engine, [[9] * longest, [8]])).rows
        assert all(np.isfinite(row).all() for row in rows)


async def test_a_prompt_between_a_batch_and_a_chunk_of_the_usual_size_is_run(checkpoint: Checkpoint) -> None:
    """Longer than a batch and no longer than a chunk would be, if a chunk could be larger than a batch."""
    async with engine_of(checkpoint("qwen3"), max_num_batched_tokens=32) as engine:
        assert len((await ask(engine, [[9] * 60], deadline=time.monotonic() + 10)).rows) == 1


@pytest.fixture(scope="module")
def adapters(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        model = AutoModel.from_pretrained(checkpoint("qwen3"), dtype=torch.float32)
        write_lora(root / name, model, seed, r=4 + seed, target_modules=["k_proj", "v_proj", "down_proj"])
    return {name: str(root / name) for name in "ab"}


@pytest.mark.parametrize("task", ["embed", "token_embed"])
async def test_adapters_answer_in_parts_as_they_do_whole(
    task: Task, checkpoint: Checkpoint, adapters: dict[str, str]
) -> None:
    """Side by side in one batch, with one beginning, in chunks and beside what others keep."""
    prompts = [BEGINNING[: 8 * i] + [60 + i] * (1 + 5 * i) for i in range(6)]
    names = [None, "a", "b"]
    options: dict[str, Any] = {"lora_modules": adapters, "pooler_config": PoolerConfig(pooling_type="LAST")}
    rows: dict[bool, list[np.ndarray[Any, Any]]] = {}
    for kept in (False, True):
        async with engine_of(checkpoint("qwen3"), **(SMALL if kept else OFF), **options) as engine:
            for _ in range(1 + kept):
                asked = (ask(engine, prompts, task, adapter=name) for name in names)
                rows[kept] = [row for result in await asyncio.gather(*asked) for row in result.rows]
    for one, other in zip(rows[True], rows[False], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    base, a, b = (np.concatenate([row.ravel() for row in rows[True][6 * i : 6 * i + 6]]) for i in range(3))
    assert min(np.abs(base - a).max(), np.abs(base - b).max(), np.abs(a - b).max()) > 1e-3


async def test_what_one_adapter_keeps_is_not_found_by_another(
    checkpoint: Checkpoint, adapters: dict[str, str]
) -> None:
    async with engine_of(checkpoint("qwen3"), lora_modules=adapters) as engine:
        for name in (None, "a", "b"):
            found = [(await ask(engine, [[*BEGINNING, i]], adapter=name)).cached_tokens for i in (1, 2)]
            assert found == [0, 32], name


async def test_who_leaves_takes_nothing_along(checkpoint: Checkpoint) -> None:
    async with engine_of(checkpoint("qwen3"), **SMALL) as engine:
        tasks = [
            asyncio.ensure_future(
                ask(engine, [[i + 3] * (20 + i * 7 % 90)] * 2, deadline=time.monotonic() + 5)
            )
            for i in range(20)
        ]
        await asyncio.sleep(0.02)
        for task in tasks[::2]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(answer, PoolingResult) for answer in answers) >= 10
        for _ in range(100):
            stats = engine.cache_stats
            if stats is not None and not stats.used_blocks:
                return
            await asyncio.sleep(0.02)
        pytest.fail("blocks are held that nobody waits for")
