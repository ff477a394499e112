"""Sparse embeddings: [n, 2] a text, its entries of the vocabulary and their weights, in the entries' order.

Entries are whole numbers in float32, which is exact up to 16 million: no vocabulary is as large.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carpool.engine.packing import PackedBatch
from carpool.engine.poolers.pooler import Pool, Pooled, Row, split, token_rows
from carpool.engine.sequence import Sequence


class NonZeroPool:
    """What is not 0 in the vectors [V] of another pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        return self._pool(hidden, packed, places, sequences).then(lambda rows: list(map(_sparse, rows)))


def _sparse(vector: Row) -> Row:
    return _entries(np.flatnonzero(vector), vector[vector != 0])


class LexicalPool:
    """The tokens of the text itself, each with the largest weight that any of its places has (BGE-M3)."""

    def __init__(self, head: nn.Module, unweighted: frozenset[int]) -> None:
        """`head` takes float32 rows [R, H] to weights [R, 1], through a ReLU; `unweighted` tokens are left out."""
        self._head = head
        self._unweighted = np.array(sorted(unweighted), dtype=np.int64)

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        rows, lengths = token_rows(hidden, packed, places)
        weights = torch.relu(self._head(rows.float()))

        def unpack(arrays: Seq[Row]) -> list[Row]:
            texts = zip(split(arrays[0][:, 0], lengths), sequences, strict=True)
            return [self._of_text(own, np.array(seq.token_ids)) for own, seq in texts]

        return Pooled((weights,), unpack)

    def _of_text(self, weights: NDArray[np.float32], token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        # NaN is not below either, and is kept: `maximum` hands it on, and the text fails instead of losing a word.
        kept = ~(weights <= 0) & ~np.isin(token_ids, self._unweighted)
        entries, owner = np.unique(token_ids[kept], return_inverse=True)
        largest = np.zeros(len(entries), np.float32)
        np.maximum.at(largest, owner, weights[kept])
        return _entries(entries, largest)


def _entries(places: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([places.astype(np.float32), weights], axis=1)
