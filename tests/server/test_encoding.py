"""Vectors as text and bytes, exact to the bit."""

from __future__ import annotations

import base64
import json
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carpool.server import slices
from carpool.server.encoding import (
    EMBEDDING,
    base64_items,
    cosines,
    float_array,
    float_items,
    places,
    raw_vectors,
)
from carpool.server.errors import InvalidRequest
from carpool.server.slices import in_good_time

TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
VECTORS = np.random.default_rng(0).standard_normal((5, 384), dtype=np.float32) / 20
ROWS = list(VECTORS)


def torch_bytes(numbers: Any, dtype: str) -> bytes:
    return bytes(torch.tensor(numbers).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes())


def test_floats_are_the_shortest_text_of_the_same_float32() -> None:
    items = json.loads(float_items(ROWS))
    assert [item["index"] for item in items] == list(range(5))
    assert {item["object"] for item in items} == {"embedding"}
    assert np.array_equal(np.array([item["embedding"] for item in items], np.float32), VECTORS)
    assert float_items([np.array([0.1, 1e-8, -2.5], np.float32)]) == (
        b'[{"index":0,"object":"embedding","embedding":[0.1,1e-8,-2.5]}]'
    )


def test_rows_that_are_not_contiguous_are_written_all_the_same() -> None:
    rows = [np.arange(12, dtype=np.float32).reshape(3, 4).T]
    assert json.loads(float_items(rows))[0]["embedding"] == rows[0].tolist()


@pytest.mark.parametrize("dtype", TORCH)
def test_casts_are_torchs(dtype: Any) -> None:
    assert raw_vectors(ROWS, dtype, "native") == torch_bytes(VECTORS, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"])
def test_ties_and_tiny_numbers_round_as_torch_rounds(dtype: Any) -> None:
    exact = torch.arange(256 if dtype.startswith("fp8") else 65536, dtype=torch.int32)
    bits = exact.to(torch.uint8 if dtype.startswith("fp8") else torch.int16).view(TORCH[dtype]).float()
    grid = torch.tensor(sorted(set(bits[bits.isfinite()].tolist())))
    halfway = ((grid[1:].double() + grid[:-1].double()) / 2).float()
    numbers = torch.cat(
        [grid, halfway, torch.nextafter(halfway, grid[1:]), torch.nextafter(halfway, grid[:-1])]
    )
    row = numbers.numpy().astype(np.float32)
    assert raw_vectors([row], dtype, "native") == torch_bytes(row, dtype)


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.floats(-400, 400, width=32), min_size=1, max_size=20),
    dtype=st.sampled_from(sorted(TORCH)),
)
def test_any_numbers_round_as_torch_rounds(numbers: list[float], dtype: Any) -> None:
    row = np.array(numbers, np.float32)
    assert raw_vectors([row], dtype, "native") == torch_bytes(row, dtype)


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("fp8_e5m2", 1)]
)
def test_endianness_swaps_each_number(dtype: Any, width: int) -> None:
    native = np.frombuffer(raw_vectors(ROWS, dtype, "native"), np.uint8).reshape(-1, width)
    other = "big" if sys.byteorder == "little" else "little"
    assert raw_vectors(ROWS, dtype, other) == native[:, ::-1].tobytes()  # type: ignore[arg-type]
    assert raw_vectors(ROWS, dtype, sys.byteorder) == native.tobytes()


@pytest.mark.parametrize(
    ("dtype", "number"), [("float16", 70000.0), ("fp8_e4m3", 500.0), ("fp8_e5m2", 70000.0)]
)
def test_what_a_dtype_cannot_hold_is_refused_and_never_sent_as_infinity(dtype: Any, number: float) -> None:
    with pytest.raises(InvalidRequest, match=dtype) as caught:
        raw_vectors([np.array([number], np.float32)], dtype, "native")
    assert caught.value.param == "embed_dtype"


@pytest.mark.parametrize("dtype", TORCH)
def test_base64_is_that_of_each_vectors_bytes(dtype: Any) -> None:
    items = json.loads(base64_items(ROWS, dtype, "native"))
    assert [base64.b64decode(item["embedding"]) for item in items] == [
        torch_bytes(row, dtype) for row in VECTORS
    ]


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("endianness", ["little", "big"])
def test_rows_that_are_of_the_dtype_already_give_the_same_bytes(
    dtype: Any, kind: Any, endianness: Any
) -> None:
    """All of them, or some: of several tasks of one prompt only embeddings come so."""
    cast = [row.astype(kind) for row in ROWS]
    expected = raw_vectors(ROWS, dtype, endianness)
    assert raw_vectors(cast, dtype, endianness) == expected
    assert raw_vectors([*cast[:2], *ROWS[2:]], dtype, endianness) == expected


def test_places_say_where_each_vector_lies() -> None:
    rows = [np.zeros((3, 2), np.float32), np.zeros(4, np.float32)]
    assert [(place.start, place.end, place.shape) for place in places(rows, "bfloat16", "big")] == [
        (0, 12, (3, 2)),
        (12, 20, (4,)),
    ]
    assert len(raw_vectors(rows, "bfloat16", "big")) == 20


def test_slices_make_the_whole_and_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS * 100
    once = float_items(rows)
    monkeypatch.setattr(slices, "SLICE", 1000)
    parts = list(float_array(rows, EMBEDDING).slices())
    assert b"".join(parts) == once
    assert max(map(len, parts)) < 3 * 384 * 15
    assert [item["index"] for item in json.loads(once)] == list(range(500))


async def test_much_work_is_done_beside_the_loop() -> None:
    assert await in_good_time(threading.get_ident, slices.LARGE - 1) == threading.get_ident()
    assert await in_good_time(threading.get_ident, slices.LARGE) != threading.get_ident()


def test_cosines_are_of_the_first_with_each_other() -> None:
    rows = [np.array(row, np.float32) for row in ([3, 4], [6, 8], [-4, 3], [-3, -4], [0, 0])]
    assert cosines(rows) == pytest.approx([1, 0, -1, 0], abs=1e-6)
    assert cosines([rows[-1], rows[0]]) == [0]
