"""Slicing: texts longer than the model takes, embedded in slices and averaged (`enable_chunked_processing`). Pure."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

_UNIT = 1e-2  # how far from 1 the length of a normalised vector may be


def slice_ids(token_ids: Seq[list[int]], length: int) -> tuple[list[list[int]], list[int]]:
    """Cut each prompt into consecutive slices of at most `length` ids; also how many slices each gave."""
    slices: list[list[int]] = []
    counts = []
    for ids in token_ids:
        parts = [ids[i : i + length] for i in range(0, len(ids), length)]
        slices += parts
        counts.append(len(parts))
    return slices, counts


def merge_rows(
    rows: Seq[NDArray[np.float32]], lengths: Seq[int], counts: Seq[int]
) -> list[NDArray[np.float32]]:
    """One vector a prompt: the mean of its slices' vectors, weighted by their lengths, in float32.

    Where every slice had unit length, so does the mean.
    """
    merged: list[NDArray[np.float32]] = []
    start = 0
    for count in counts:
        part = slice(start, start + count)
        start += count
        if count == 1:
            merged.append(rows[part][0])
            continue
        vectors = np.stack(rows[part])
        weights = np.asarray(lengths[part], dtype=np.float32)
        mean = weights @ vectors / weights.sum()
        if (np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT).all():
            mean /= max(float(np.linalg.norm(mean)), 1e-12)
        merged.append(mean)
    return merged
