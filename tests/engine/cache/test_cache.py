"""What prompts are told of the cache, and it of them."""

from __future__ import annotations

import pytest

from carpool.engine.cache.blocks import BlockPool
from carpool.engine.cache.cache import Cache
from carpool.engine.cache.paging import Paging
from carpool.engine.params import Task

SIZE, CHUNK, BLOCKS = 4, 16, 20


def cache(*last_only: Task, finds_prefixes: bool = True) -> Cache:
    return Cache(Paging(BlockPool(BLOCKS, SIZE), CHUNK), frozenset(last_only), finds_prefixes)


def test_a_task_of_the_last_token_looks_for_prefixes() -> None:
    [long, short] = cache("embed").prompts([[1] * 30, [1] * 3], ("embed",))
    assert long is not None
    assert long.reuse
    assert len(long.hashes) == 7
    assert short is None, "not one block"


@pytest.mark.parametrize("tasks", [("token_embed",), ("embed", "token_embed")])
def test_a_task_of_all_tokens_does_not(tasks: tuple[Task, ...]) -> None:
    [long, short] = cache("embed").prompts([[1] * 30, [1] * 10], tasks)
    assert long is not None
    assert not long.reuse
    assert not long.hashes
    assert short is None, "it is run whole"


def test_without_prefixes_long_prompts_are_still_run_in_chunks() -> None:
    [long, short] = cache("embed", finds_prefixes=False).prompts([[1] * 30, [1] * 10], ("embed",))
    assert long is not None
    assert long.reuse, "only its last token counts: nothing else need be kept"
    assert not long.hashes
    assert short is None


def test_what_the_cache_cannot_hold_is_not_run_in_chunks() -> None:
    held, more = cache().prompts([[1] * (BLOCKS * SIZE), [1] * (BLOCKS * SIZE + 1)], ("token_embed",))
    assert held is not None
    assert more is None
    assert cache().num_tokens == BLOCKS * SIZE


def test_adapters_salts_and_token_types_do_not_share() -> None:
    ids = [[1] * 30]
    told = [
        cache("embed").prompts(ids, ("embed",), adapter, salt, starts)[0]
        for adapter, salt, starts in [
            (0, None, None),
            (1, None, None),
            (0, "a", None),
            (0, "b", None),
            (0, "", None),
            (0, None, [3]),
            (0, None, [4]),
        ]
    ]
    hashes = [tuple(prompt.hashes) for prompt in told if prompt is not None]
    assert len(set(hashes)) == 7
    [same] = cache("embed").prompts(ids, ("embed",), type_starts=[3])
    assert same is not None
    assert tuple(same.hashes) == hashes[5]
