"""Slicing: long texts in slices, and their vectors merged again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.prepared import Prepared
from carpool.engine.slicing import Slices, merge_rows

Row = np.ndarray[Any, np.dtype[np.float32]]
_ids = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=5)


def row(values: list[float]) -> Row:
    return np.array(values, np.float32)


@given(_ids, st.integers(1, 8))
def test_slices_end_to_end_are_the_text_and_all_but_the_last_are_full(
    token_ids: list[list[int]], length: int
) -> None:
    sliced = Slices.of(Prepared(token_ids), length)
    slices, counts = sliced.token_ids, sliced.counts
    assert sliced.whole == token_ids
    assert sum(counts) == len(slices)
    start = 0
    for ids, count in zip(token_ids, counts, strict=True):
        own = slices[start : start + count]
        start += count
        assert [token for part in own for token in part] == ids
        assert all(len(part) == length for part in own[:-1])
        assert 0 < len(own[-1]) <= length


@given(_ids, st.integers(1, 8))
def test_the_merged_vector_is_the_mean_weighted_by_length(token_ids: list[list[int]], length: int) -> None:
    sliced = Slices.of(Prepared(token_ids), length)
    slices, counts = sliced.token_ids, sliced.counts
    generator = np.random.default_rng(len(slices))
    rows = [generator.standard_normal(6).astype(np.float32) * 5 for _ in slices]
    merged = merge_rows(rows, list(map(len, slices)), counts)
    start = 0
    for ids, count, vector in zip(token_ids, counts, merged, strict=True):
        exact = sum(len(slices[i]) * rows[i].astype(float) for i in range(start, start + count)) / len(ids)
        np.testing.assert_allclose(vector, exact, atol=1e-5)
        assert vector.dtype == np.float32
        start += count


def test_unit_vectors_merge_to_a_unit_vector() -> None:
    rows = [row([1, 0]), row([0, 1]), row([0.6, 0.8])]
    merged = merge_rows(rows, [3, 1, 2], [2, 1])
    np.testing.assert_allclose(merged[0], np.array([3, 1]) / np.sqrt(10), atol=1e-6)
    assert merged[1] is rows[2]  # one slice: nothing was merged


def test_slices_that_cancel_out_merge_to_zeros() -> None:
    (merged,) = merge_rows([row([1, 0]), row([-1, 0])], [4, 4], [2])
    assert merged.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("length", [5, 50])
def test_what_fits_is_one_slice(length: int) -> None:
    whole = [[1, 2, 3, 4, 5]]
    assert Slices.of(Prepared(whole), length) == Slices(whole, whole, [1])
