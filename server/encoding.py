"""Results on their way out: float text, base64, or raw bytes. The only file of this room that knows arrays of numbers.

Its writers make text of any run of items, so that large answers are written slice by slice (`slices.py`).
"""

from __future__ import annotations

import sys
from binascii import b2a_base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import ml_dtypes
import numpy as np
import orjson
from numpy.typing import NDArray

from carpool.engine.errors import InferenceFailed
from carpool.server.errors import InvalidRequest
from carpool.server.protocol import EmbedDType, Endianness, VectorPlace
from carpool.server.slices import CHARACTERS, ITEM, LATER, SLICE, Array

Row = NDArray[Any]  # float32, or what a request for 16-bit numbers gets from the engine as such
Rows = Sequence[Row]

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


# ── arrays, by what is in them ───────────────────────────────────────────────────────────────────────────────


def float_array(rows: Rows, style: ItemStyle) -> Array:
    return Array(float_items, rows, (style,), cut=_float_slices)


def base64_array(rows: Rows, dtype: EmbedDType, endianness: Endianness, style: ItemStyle) -> Array:
    cut = partial(_base64_slices, dtype=dtype, endianness=endianness)
    return Array(
        base64_items, rows, (dtype, endianness, style), cut=cut, check=partial(_check_range, rows, dtype)
    )


def array_by_task(
    rows: Rows, tasks: Sequence[str], layout: tuple[EmbedDType, Endianness] | None = None
) -> Array:
    """Of several results a prompt, each under its task's name. `layout` is of base64; None: as numbers."""
    if layout is None:
        return Array(items_by_task, rows, (tasks, None), width=len(tasks), cut=_float_slices)
    cut = partial(_base64_slices, dtype=layout[0], endianness=layout[1])
    check = partial(_check_range, rows, layout[0])
    return Array(items_by_task, rows, (tasks, layout), width=len(tasks), cut=cut, check=check)


def bare_array(rows: Rows) -> Array:
    """Vectors and nothing else."""
    return Array(bare_items, rows, cut=_float_slices)


def class_array(rows: Rows, labels: Sequence[str | None]) -> Array:
    return Array(class_items, rows, (labels,))


def list_array(items: Sequence[str] | Sequence[int]) -> Array:
    """Texts, or token ids, as they are."""
    return Array(plain_items, items, weigh=_weight)


def plain_array(numbers: Sequence[float]) -> Array:
    """Scores and nothing else."""
    return Array(plain_items, numbers, weigh=lambda _: 1)


def score_array(write: Callable[..., bytes], scores: Sequence[float]) -> Array:
    return Array(write, scores, weigh=lambda _: ITEM)


def ranked_array(
    write: Callable[..., bytes], best: Sequence[tuple[int, float]], documents: Sequence[str] | None
) -> Array:
    """Places and scores, with the documents' texts where they are shown."""
    if documents is None:
        return Array(write, best, (documents,), weigh=lambda _: ITEM)
    return Array(write, best, (documents,), weigh=lambda ranked: ITEM + _weight(documents[ranked[0]]))


def _weight(item: str | int) -> int:
    return 1 + len(item) // CHARACTERS if isinstance(item, str) else 1


# ── what they write ──────────────────────────────────────────────────────────────────────────────────────────


def float_items(rows: Rows, style: ItemStyle = EMBEDDING, first: int = 0) -> bytes:
    """Items of the `data` array; each number is the shortest text that parses to the same float32."""
    return _items(_contiguous(rows), style, first)


def base64_items(
    rows: Rows,
    dtype: EmbedDType,
    endianness: Endianness,
    style: ItemStyle = EMBEDDING,
    first: int = 0,
) -> bytes:
    """Items of the `data` array, each result as base64 of its numbers, row by row."""
    return _items(base64_texts(rows, dtype, endianness), style, first)


def items_by_task(
    rows: Rows, tasks: Sequence[str], layout: tuple[EmbedDType, Endianness] | None, first: int = 0
) -> bytes:
    """Items of the `data` array with a result a task."""
    results = _contiguous(rows) if layout is None else base64_texts(rows, *layout)
    width = len(tasks)
    prompts = [dict(zip(tasks, results[i : i + width], strict=True)) for i in range(0, len(results), width)]
    return _items(prompts, POOLING, first)


def base64_texts(rows: Rows, dtype: EmbedDType, endianness: Endianness) -> list[Any]:
    """A text a row; LATER stays."""
    if dtype == "float32" and endianness in ("native", sys.byteorder):  # straight from the rows as they lie
        return [
            row
            if row is LATER
            else b2a_base64(np.ascontiguousarray(row, np.float32).data, newline=False).decode()
            for row in rows
        ]
    here = [row for row in rows if row is not LATER]
    buffer = memoryview(raw_vectors(here, dtype, endianness)) if here else memoryview(b"")
    extents = iter(_extents(here, dtype))
    return [
        row if row is LATER else b2a_base64(buffer[slice(*next(extents))], newline=False).decode()
        for row in rows
    ]


def base64_list(rows: Rows, dtype: EmbedDType, endianness: Endianness, first: int = 0) -> bytes:
    return orjson.dumps(base64_texts(rows, dtype, endianness))


def bare_items(rows: Rows, first: int = 0) -> bytes:
    """The vectors as a JSON array of arrays and nothing else, each number its shortest text."""
    return orjson.dumps(_contiguous(rows), option=orjson.OPT_SERIALIZE_NUMPY)


def plain_items(items: Sequence[str] | Sequence[float], first: int = 0) -> bytes:
    return orjson.dumps(items)


def class_items(rows: Rows, labels: Sequence[str | None], first: int = 0) -> bytes:
    """Of each row [C] the likeliest class and all probabilities."""
    items = []
    for index, row in enumerate(rows, first):
        best = int(row.argmax())
        items.append(
            {
                "index": index,
                "label": labels[best] if best < len(labels) else None,
                "probs": np.ascontiguousarray(_finite(row)),
                "num_classes": row.size,
            }
        )
    return orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)


def sparse_items(rows: Rows, first: int = 0) -> bytes:
    """Sparse vectors [n, 2] as a JSON array of arrays of {"index", "value"}."""
    texts = [
        [
            {"index": int(index), "value": value}
            for index, value in zip(row[:, 0], shortest(row[:, 1]), strict=True)
        ]
        for row in rows
    ]
    return orjson.dumps(texts)


def sign_items(rows: Rows, signed: bool, first: int = 0) -> bytes:
    """One bit a component, set from 0 upwards, most significant first; as bytes, or 128 less."""
    packed = np.packbits(np.stack(rows) >= 0, axis=1).astype(np.int16)
    return orjson.dumps((packed - 128 if signed else packed).tolist())


def _contiguous(rows: Rows) -> list[Any]:
    """As orjson wants them; LATER stays."""
    return [row if row is LATER else np.ascontiguousarray(row) for row in rows]


def _items(results: Sequence[Any], style: ItemStyle, first: int) -> bytes:
    items = [
        {"index": index, "object": style.object, style.field: result}
        for index, result in enumerate(results, first)
    ]
    return orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)


def _float_slices(row: Row) -> Iterator[bytes]:
    """The text of one long row, [n, D] or [D], slice by slice."""
    step = max(1, SLICE // (row[0].size or 1))
    yield b"["
    for first in range(0, len(row), step):
        part = np.ascontiguousarray(row[first : first + step])
        yield (b"," if first else b"") + orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    yield b"]"


def _base64_slices(row: Row, dtype: EmbedDType, endianness: Endianness) -> Iterator[bytes]:
    """The text of one long row, slice by slice: three numbers are no fraction of base64's groups of three bytes."""
    yield b'"'
    for part in _cut(row, 3 * SLICE):
        yield b2a_base64(raw_vectors([part], dtype, endianness), newline=False)
    yield b'"'


def _cut(row: Row, step: int) -> Iterator[Row]:
    flat = row.reshape(-1)
    for first in range(0, flat.size, step):
        yield flat[first : first + step]


def _check_range(rows: Rows, dtype: EmbedDType) -> None:
    """Raise what `raw_vectors` would, without keeping what it makes."""
    if dtype != "float32":
        for row in rows:
            for part in _cut(row, SLICE):
                _cast(part, dtype)


def raw_slices(rows: Rows, dtype: EmbedDType, endianness: Endianness) -> Iterator[bytes]:
    """`raw_vectors`, slice by slice."""
    _check_range(rows, dtype)
    for first, end in Array(bare_items, rows).runs():
        if end - first > 1:
            yield raw_vectors(rows[first:end], dtype, endianness)
        else:
            for part in _cut(rows[first], SLICE):
                yield raw_vectors([part], dtype, endianness)


def shortest(numbers: Row) -> list[float]:
    """Doubles whose shortest text is that of the float32 they stand for."""
    floats: list[float] = orjson.loads(
        orjson.dumps(np.ascontiguousarray(_finite(numbers)), option=orjson.OPT_SERIALIZE_NUMPY)
    )
    return floats


def _finite(numbers: Row) -> Row:
    if not np.isfinite(numbers).all():
        raise InferenceFailed("A score is not a finite number.")
    return numbers


def cosines(rows: Rows) -> list[float]:
    """Of the first vector with each of the others, in float32; 0 where one has no length."""
    vectors = np.stack(rows).astype(np.float32, copy=False)
    lengths = np.linalg.norm(vectors, axis=1)
    products = vectors[1:] @ vectors[0]
    both = lengths[1:] * lengths[0]
    return shortest(np.divide(products, both, out=np.zeros_like(products), where=both != 0))


def shortest_scores(scores: Sequence[float]) -> list[float]:
    return shortest(np.asarray(scores, np.float32))


def best_first(scores: Sequence[float]) -> list[tuple[int, float]]:
    """Places and scores; of equal scores the earlier place comes first."""
    return sorted(enumerate(shortest_scores(scores)), key=lambda pair: -pair[1])


def raw_vectors(rows: Rows, dtype: EmbedDType, endianness: Endianness) -> bytes:
    """All vectors end to end, rounded to nearest even as torch rounds."""
    cast = _cast(np.concatenate([row.reshape(-1) for row in rows]), dtype)
    if endianness not in ("native", sys.byteorder) and cast.itemsize > 1:
        cast = cast.view(f"u{cast.itemsize}").byteswap()
    return cast.tobytes()


def _cast(numbers: Row, dtype: EmbedDType) -> Row:
    with np.errstate(over="ignore"):
        cast: Row = numbers.astype(DTYPES[dtype], copy=False)
    if dtype != "float32" and not np.isfinite(cast).all():
        raise InvalidRequest(f"A vector holds numbers too large for {dtype}; use float32.", "embed_dtype")
    return cast


def num_bytes(rows: Rows, dtype: EmbedDType) -> int:
    """Of `raw_vectors`."""
    return int(np.dtype(DTYPES[dtype]).itemsize) * sum(row.size for row in rows)


def zeros(count: int, shape: tuple[int, ...]) -> Rows:
    """Rows to ask where they would lie; they take no memory."""
    return [np.broadcast_to(np.float32(0), shape)] * count


def places(rows: Rows, dtype: EmbedDType, endianness: Endianness) -> list[VectorPlace]:
    """Where each vector lies in `raw_vectors`."""
    return [
        VectorPlace(index, dtype, endianness, start, end, row.shape)
        for index, (row, (start, end)) in enumerate(zip(rows, _extents(rows, dtype), strict=True))
    ]


def _extents(rows: Rows, dtype: EmbedDType) -> list[tuple[int, int]]:
    width = np.dtype(DTYPES[dtype]).itemsize
    return list(pairwise(accumulate((row.size * width for row in rows), initial=0)))
