"""Slicing: texts longer than the model takes, embedded in slices and averaged (`enable_chunked_processing`). Pure."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from carpool.engine.errors import InvalidInput
from carpool.engine.outputs import PoolingResult
from carpool.engine.prepared import Prepared

_UNIT = 1e-2  # how far from 1 the length of a normalised vector may be


@dataclass(frozen=True, slots=True)
class Slices:
    """Prompts, each cut into consecutive slices: `counts[i]` of prompt i, whose ids are `whole[i]`."""

    whole: list[list[int]]
    token_ids: list[list[int]]
    counts: list[int]

    @classmethod
    def of(cls, prompts: Prepared, length: int) -> Slices:
        """None longer than `length` ids. Raises InvalidInput for prompts that cannot be cut."""
        if prompts.skip:
            raise InvalidInput(
                "This model leaves prompts out of its pooling, so a text with a prompt cannot be sliced.",
                "input",
            )
        parts = [[ids[i : i + length] for i in range(0, len(ids), length)] for ids in prompts.token_ids]
        return cls(prompts.token_ids, [own for each in parts for own in each], list(map(len, parts)))

    def merge(self, result: PoolingResult) -> None:
        """Make the result of the slices that of the prompts."""
        result.rows = merge_rows(result.rows, list(map(len, self.token_ids)), self.counts)
        result.prompt_token_ids = self.whole
        of_slices = iter(result.cached)
        result.cached = [sum(islice(of_slices, count)) for count in self.counts]


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
