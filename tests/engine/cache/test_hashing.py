"""Hashing: equal names for equal prefixes, and for nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.cache.hashing import Extra, block_hashes

TOKENS = st.lists(st.integers(0, 2), max_size=12)
ATOMS = st.integers(-300, 300) | st.text(max_size=3) | st.binary(max_size=3) | st.none()
EXTRAS: st.SearchStrategy[Any] = st.recursive(
    st.lists(ATOMS, max_size=3).map(tuple),
    lambda inner: st.lists(ATOMS | inner, max_size=3).map(tuple),
    max_leaves=4,
)


@given(TOKENS, TOKENS, EXTRAS, EXTRAS, st.integers(1, 4))
def test_two_hashes_are_equal_where_all_before_them_is(
    a: list[int], b: list[int], extra_a: Extra, extra_b: Extra, block_size: int
) -> None:
    ours, theirs = block_hashes(a, block_size, extra_a), block_hashes(b, block_size, extra_b)
    assert (len(ours), len(theirs)) == (len(a) // block_size, len(b) // block_size)
    for i, mine in enumerate(ours, 1):
        for j, other in enumerate(theirs, 1):
            prefixes_equal = a[: i * block_size] == b[: j * block_size]
            assert (mine == other) == (prefixes_equal and extra_a == extra_b)


@given(TOKENS, TOKENS, st.integers(1, 4))
def test_what_follows_a_block_leaves_its_hash_alone(
    head: list[int], tail: list[int], block_size: int
) -> None:
    hashes = block_hashes(head, block_size)
    assert block_hashes(head + tail, block_size)[: len(hashes)] == hashes


ALIKE: list[Extra] = [
    (), ((),), ("",), (b"",), (None,), (0,), ("0",), (b"0",),
    ("ab", "c"), ("a", "bc"), ("abc",), (("ab",), "c"), (("ab", "c"),),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), list(combinations(ALIKE, 2)))
def test_what_looks_alike_is_told_apart(one: Extra, other: Extra) -> None:
    assert block_hashes([1, 2], 2, one) != block_hashes([1, 2], 2, other)


def test_what_goes_before_cannot_pose_as_tokens() -> None:
    """Without its length, an extra that ends in what a token looks like in memory would be that token."""
    seven = (7).to_bytes(4, sys.byteorder)
    assert block_hashes([7, 7], 2, (b"",)) != block_hashes([7], 1, (seven,))


def test_a_salt_may_hold_half_a_surrogate_pair() -> None:
    assert block_hashes([1], 1, ("\ud800",)) != block_hashes([1], 1, ("\udc00",))


def test_hashes_are_of_16_bytes_and_the_same_in_every_process() -> None:
    code = "from carpool.engine.cache.hashing import block_hashes; print(block_hashes([1, 2, 3], 1, ('a',)))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    here = block_hashes([1, 2, 3], 1, ("a",))
    assert told == {str(here)}
    assert {len(name) for name in here} == {16}


def test_what_has_no_bytes_of_its_own_is_refused() -> None:
    with pytest.raises(TypeError, match="float"):
        block_hashes([1], 1, (0.5,))  # type: ignore[arg-type]


def test_ids_are_not_cut_to_fit() -> None:
    with pytest.raises(OverflowError):
        block_hashes([1 << 40], 1)


def test_a_block_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        block_hashes([1], 0)
