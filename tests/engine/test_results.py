"""Results: a dict that forgets what was not asked for longest, and names that tell all that differs apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from carpool.engine import results as results_module
from carpool.engine.params import PoolingParams
from carpool.engine.prepared import Prepared
from carpool.engine.results import Results, result_keys

ENTRY = results_module._ENTRY_BYTES


def changed(name: str) -> PoolingParams:
    return replace(PoolingParams(), **{name: OTHER_PARAMS[name]})


def row(size: int, value: float = 0.0) -> np.ndarray[Any, Any]:
    return np.full(size, value, np.float32)


@given(
    st.integers(0, 4 * ENTRY),
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 300)), max_size=60),
)
def test_it_is_a_dict_that_forgets_the_least_recently_used_beyond_its_bytes(
    most: int, steps: list[tuple[bool, int, int]]
) -> None:
    results, model, hits, misses = Results(most), dict[bytes, int](), 0, 0  # model: sizes, oldest first
    for asks, number, size in steps:
        key = b"%d" % number
        if asks:
            [found] = results.find([key])
            assert (found is not None) == (key in model)
            if found is not None:
                np.testing.assert_array_equal(found, row(model[key], number))
                model[key] = model.pop(key)
            hits, misses = hits + (key in model), misses + (key not in model)
        else:
            results.keep(key, row(size, number))
            if key not in model and 4 * size + ENTRY <= most:
                model[key] = size
                while sum(4 * each + ENTRY for each in model.values()) > most:
                    del model[next(iter(model))]
        stats = results.stats
        if not most:
            assert stats is None
            continue
        assert stats is not None
        assert stats.num_bytes == sum(4 * each + ENTRY for each in model.values()) <= most
        assert (stats.hits, stats.misses, stats.max_bytes) == (hits, misses, most)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_a_row_comes_back_as_it_was_and_cannot_be_changed(dtype: type) -> None:
    batch: np.ndarray[Any, Any] = np.arange(12).astype(dtype).reshape(3, 4)
    results = Results(1 << 20)
    results.keep(b"k", batch[1])
    batch[:] = 0
    [found] = results.find([b"k"])
    assert found is not None
    assert found.dtype == dtype
    assert found.base is None, "no batch is kept for its sake"
    assert found.tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_the_estimate_of_an_entry_is_no_less_than_what_it_takes() -> None:
    import tracemalloc

    rows = [row(1) for _ in range(5000)]
    results = Results(1 << 30)
    tracemalloc.start()
    try:
        for i, each in enumerate(rows):
            results.keep(i.to_bytes(32, "big") + b"token_classify", each)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert results.stats is not None
    assert taken <= results.stats.num_bytes <= 3 * taken


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────


def key(
    ids: tuple[int, ...] = (1, 2, 3), start: int | None = None, unseen: int | None = None, skip: int = 0,
    task: Any = "embed", params: PoolingParams | None = None, adapter: int = 0, salt: str | None = None,
) -> bytes:  # fmt: skip
    prepared = Prepared([list(ids)], [start], [unseen], skip)
    [name] = result_keys(prepared, (task,), params or PoolingParams(), adapter, salt)
    return name


OTHER_PARAMS: dict[str, Any] = {
    "dimensions": 2, "use_activation": False, "normalize": False, "softmax": False, "activation": False,
    "embed_dtype": "float16",
}  # fmt: skip
OF_SCRIPTS = {
    "task",
    "truncate_prompt_tokens",
    "extra_kwargs",
    "late_chunking_params",
}  # gone before the engine
DIFFERENT: list[Callable[[], bytes]] = [
    lambda: key(),
    lambda: key((1, 2)),
    lambda: key((1, 2, 3, 0)),
    lambda: key(start=1),
    lambda: key(unseen=1),
    lambda: key(skip=1),
    lambda: key(task="token_embed"),
    lambda: key(adapter=1),
    lambda: key(salt=""),
    lambda: key(salt="a"),
    *(partial(lambda name: key(params=changed(name)), name) for name in OTHER_PARAMS),
]


def test_all_that_a_row_depends_on_is_in_its_name() -> None:
    known = OTHER_PARAMS.keys() | OF_SCRIPTS
    assert {field.name for field in fields(PoolingParams)} == known, "a new one must be tried here"
    names = [make() for make in DIFFERENT]
    assert all(one != other for one, other in combinations(names, 2))
    assert names == [make() for make in DIFFERENT]


def test_names_come_task_by_task_of_each_prompt() -> None:
    prepared = Prepared([[1], [2]])
    names = result_keys(prepared, ("embed", "sparse_embed"), PoolingParams())
    assert names == [
        *result_keys(Prepared([[1]]), ("embed", "sparse_embed"), PoolingParams()),
        *result_keys(Prepared([[2]]), ("embed", "sparse_embed"), PoolingParams()),
    ]
    assert names[1] == result_keys(Prepared([[1]]), ("sparse_embed",), PoolingParams())[0]
