"""Vectors on their way out: float text, base64, or raw bytes. The only file of this room that knows arrays.

For base64 and bytes a request's vectors are joined into one array and cast once. Large answers are written
in another thread and a slice of rows at a time, so that 2,048 vectors do not hold up the event loop: within a
slice orjson keeps Python to itself, between slices others run.
"""

from __future__ import annotations

import asyncio
import sys
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import orjson
from numpy.typing import NDArray

from carpool.engine.errors import InferenceFailed
from carpool.server.errors import InvalidRequest
from carpool.server.protocol import EmbedDType, Endianness, VectorPlace

Row = NDArray[Any]  # float32, or what a request for 16-bit numbers gets from the engine as such
Rows = Sequence[Row]
T = TypeVar("T")

LARGE = 1 << 16  # numbers in an answer; fewer are written in a millisecond or two
SLICE = 1 << 14  # numbers written in one go
DTYPES: dict[EmbedDType, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class ItemStyle:
    """How an endpoint names its results in the `data` array."""

    object: str
    field: str


EMBEDDING = ItemStyle("embedding", "embedding")
POOLING = ItemStyle("pooling", "data")


async def in_good_time(write: Callable[..., T], rows: Rows, *how: Any) -> T:
    """`write(rows, *how)`, on the event loop if it is quick and beside it if not."""
    if sum(row.size for row in rows) < LARGE:
        return write(rows, *how)
    return await asyncio.get_running_loop().run_in_executor(None, write, rows, *how)


def float_items(rows: Rows, style: ItemStyle = EMBEDDING) -> bytes:
    """The `data` array of an answer; each number is the shortest text that parses to the same float32."""
    return _json_array([np.ascontiguousarray(row) for row in rows], _slice_of(rows), style)


def base64_items(
    rows: Rows, dtype: EmbedDType, endianness: Endianness, style: ItemStyle = EMBEDDING
) -> bytes:
    """The `data` array of an answer, each result as base64 of its numbers, row by row."""
    texts = base64_texts(rows, dtype, endianness)
    return _json_array(texts, len(texts), style)


def items_by_task(rows: Rows, tasks: Sequence[str], layout: tuple[EmbedDType, Endianness] | None) -> bytes:
    """The `data` array of an answer of several results a prompt, each under its task's name.

    `layout` is of base64; None: as numbers.
    """
    results: Rows | list[str] = [np.ascontiguousarray(row) for row in rows]
    if layout is not None:
        results = base64_texts(rows, *layout)
    width = len(tasks)
    prompts = [dict(zip(tasks, results[i : i + width], strict=True)) for i in range(0, len(results), width)]
    return _json_array(prompts, _slice_of(rows), POOLING)


def base64_texts(rows: Rows, dtype: EmbedDType, endianness: Endianness) -> list[str]:
    if dtype == "float32" and endianness in ("native", sys.byteorder):  # straight from the rows as they lie
        return [
            b2a_base64(np.ascontiguousarray(row, np.float32).data, newline=False).decode() for row in rows
        ]
    buffer = memoryview(raw_vectors(rows, dtype, endianness))
    return [b2a_base64(buffer[start:end], newline=False).decode() for start, end in _extents(rows, dtype)]


def bare_items(rows: Rows) -> bytes:
    """The vectors as a JSON array of arrays and nothing else, each number its shortest text."""
    step = _slice_of(rows)
    slices = [
        orjson.dumps(
            [np.ascontiguousarray(row) for row in rows[i : i + step]], option=orjson.OPT_SERIALIZE_NUMPY
        )
        for i in range(0, len(rows), step)
    ]
    return b"[%b]" % b",".join(part[1:-1] for part in slices)


def sparse_items(rows: Rows) -> bytes:
    """Sparse vectors [n, 2] as a JSON array of arrays of {"index", "value"}."""
    texts = [
        [
            {"index": int(index), "value": value}
            for index, value in zip(row[:, 0], shortest(row[:, 1]), strict=True)
        ]
        for row in rows
    ]
    return orjson.dumps(texts)


def shortest(numbers: Row) -> list[float]:
    """Doubles whose shortest text is that of the float32 they stand for."""
    if not np.isfinite(numbers).all():
        raise InferenceFailed("A score is not a finite number.")
    floats: list[float] = orjson.loads(
        orjson.dumps(np.ascontiguousarray(numbers), option=orjson.OPT_SERIALIZE_NUMPY)
    )
    return floats


def shortest_scores(scores: Sequence[float]) -> list[float]:
    return shortest(np.asarray(scores, np.float32))


def best_first(scores: Sequence[float]) -> list[tuple[int, float]]:
    """Places and scores; of equal scores the earlier place comes first."""
    return sorted(enumerate(shortest_scores(scores)), key=lambda pair: -pair[1])


def sign_bits(rows: Rows, signed: bool) -> list[list[int]]:
    """One bit a component, set from 0 upwards, most significant first; as bytes, or 128 less."""
    width = rows[0].size
    if width % 8:
        raise InvalidRequest(
            f"Embedding dimension must be a multiple of 8 for binary embedding types, but got {width}.",
            "embedding_types",
        )
    packed = np.packbits(np.stack(rows) >= 0, axis=1).astype(np.int16)
    bits: list[list[int]] = (packed - 128 if signed else packed).tolist()
    return bits


def _slice_of(rows: Rows) -> int:
    """How many rows are written in one go."""
    return max(1, SLICE // (rows[0].size or 1))


def _json_array(results: Sequence[Any], step: int, style: ItemStyle) -> bytes:
    slices = []
    for first in range(0, len(results), step):
        items = [
            {"index": index, "object": style.object, style.field: result}
            for index, result in enumerate(results[first : first + step], first)
        ]
        slices.append(orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
    return b"[%b]" % b",".join(slices)


def raw_vectors(rows: Rows, dtype: EmbedDType, endianness: Endianness) -> bytes:
    """All vectors end to end, rounded to nearest even as torch rounds."""
    numbers = np.concatenate([row.reshape(-1) for row in rows])
    with np.errstate(over="ignore"):
        cast = numbers.astype(DTYPES[dtype], copy=False)
    if dtype != "float32" and not np.isfinite(cast).all():
        raise InvalidRequest(f"A vector holds numbers too large for {dtype}; use float32.", "embed_dtype")
    if endianness not in ("native", sys.byteorder) and cast.itemsize > 1:
        cast = cast.view(f"u{cast.itemsize}").byteswap()
    return cast.tobytes()


def places(rows: Rows, dtype: EmbedDType, endianness: Endianness) -> list[VectorPlace]:
    """Where each vector lies in `raw_vectors`."""
    return [
        VectorPlace(index, dtype, endianness, start, end, row.shape)
        for index, (row, (start, end)) in enumerate(zip(rows, _extents(rows, dtype), strict=True))
    ]


def _extents(rows: Rows, dtype: EmbedDType) -> list[tuple[int, int]]:
    width = np.dtype(DTYPES[dtype]).itemsize
    return list(pairwise(accumulate((row.size * width for row in rows), initial=0)))
