"""Whether keys and values are kept, for what, and how many: by the model, the memory and what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carpool.engine.build import Parts, build
from carpool.engine.cache import choice
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.cost import Cost
from carpool.engine.errors import ConfigError

Checkpoint = Callable[[str], Path]
LAST = PoolerConfig(pooling_type="LAST")


def built(folder: Path, **options: Any) -> Parts:
    return build(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1, **options))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma2"])
def test_a_causal_model_of_last_tokens_keeps_them_by_itself(family: str, checkpoint: Checkpoint) -> None:
    parts = built(checkpoint(family), pooler_config=LAST)
    assert parts.model.prefix_caching
    assert parts.model.chunked_prefill
    assert parts.cache is not None
    assert parts.model.kv_cache_tokens == parts.cache.num_tokens >= parts.model.max_model_len
    assert not parts.model.notices


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_encoder_keeps_nothing(family: str, checkpoint: Checkpoint) -> None:
    parts = built(checkpoint(family))
    assert parts.cache is None
    assert (parts.model.prefix_caching, parts.model.chunked_prefill, parts.model.kv_cache_tokens) == (
        False,
        False,
        0,
    )
    assert not parts.model.notices, "nobody asked for it"


def test_a_mean_of_all_tokens_is_run_in_chunks_and_finds_nothing(checkpoint: Checkpoint) -> None:
    parts = built(checkpoint("qwen3"), pooler_config=PoolerConfig(pooling_type="MEAN"))
    assert parts.model.chunked_prefill
    assert not parts.model.prefix_caching


def test_what_is_asked_for_in_vain_is_a_notice(checkpoint: Checkpoint) -> None:
    [notice] = built(checkpoint("bert"), enable_prefix_caching=True).model.notices
    assert notice.startswith("Keys and values are not kept")
    [notice] = built(checkpoint("bert"), enable_chunked_prefill=True).model.notices
    assert "looks ahead" in notice


def test_each_can_be_switched_off(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3")
    whole = built(folder, enable_chunked_prefill=False).model
    assert (whole.prefix_caching, whole.chunked_prefill) == (True, False)
    alone = built(folder, enable_prefix_caching=False).model
    assert (alone.prefix_caching, alone.chunked_prefill) == (False, True)
    assert built(folder, enable_prefix_caching=False, enable_chunked_prefill=False).cache is None


def test_memory_is_what_was_given(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3")
    given = built(folder, kv_cache_memory_bytes=1 << 20, block_size=32)
    assert given.cache is not None
    storage = given.runners[0]._storage
    assert storage is not None
    storage_bytes = sum(pages.nbytes for layer in storage.layers for pages in layer)
    assert given.model.kv_cache_bytes == storage_bytes
    assert (1 << 20) * 0.9 < storage_bytes <= 1 << 20
    assert given.cache.paging.pool.block_size == 32
    with pytest.raises(ConfigError, match="less than two blocks need"):
        built(folder, kv_cache_memory_bytes=100)


@pytest.mark.parametrize("asked", [{}, {"enable_prefix_caching": True}])
def test_where_there_is_no_memory_nothing_is_kept_and_it_is_said(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(choice, "free_memory", lambda: 0)
    parts = built(checkpoint("qwen3"), **asked)
    assert parts.cache is None
    assert [notice for notice in parts.model.notices if "no memory" in notice]


def test_by_default_it_takes_a_part_of_what_is_free_and_says_if_that_is_little(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(free: int | None) -> tuple[int, bool]:
        monkeypatch.setattr(choice, "free_memory", lambda: free)
        model = built(checkpoint("qwen3")).model
        return model.kv_cache_bytes, any("a prompt may have" in notice for notice in model.notices)

    enough, told = kept(None)
    assert not told
    assert kept(4 * enough) == (enough, False)
    little, told = kept(enough // 64)
    assert 0 < little <= enough // 64 // 4
    assert told


@pytest.mark.parametrize(
    ("options", "chunk"),
    [
        ({}, 100),
        ({"max_num_batched_tokens": 64}, 64),
        ({"long_prefill_token_threshold": 48}, 48),
        ({"long_prefill_token_threshold": 48, "max_num_batched_tokens": 64}, 48),
        ({"long_prefill_token_threshold": 96, "max_num_batched_tokens": 64}, 64),  # no batch takes more
        ({"enable_chunked_prefill": False}, None),
    ],
)
def test_a_chunk_is_what_was_asked_for_else_a_batch(
    options: dict[str, Any], chunk: int | None, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cost, "batch_tokens", lambda _: 100)
    assert built(checkpoint("qwen3"), **options).model.chunk_tokens == chunk


def test_batches_may_be_smaller_than_prompts_only_where_these_are_run_in_chunks(
    checkpoint: Checkpoint,
) -> None:
    folder = checkpoint("qwen3")
    assert built(folder, max_num_batched_tokens=32).model.max_num_batched_tokens == 32
    with pytest.raises(ConfigError, match="are not run in chunks"):
        built(folder, max_num_batched_tokens=32, enable_chunked_prefill=False)
    with pytest.raises(ConfigError, match="are not run in chunks"):
        built(checkpoint("bert"), max_num_batched_tokens=32)
