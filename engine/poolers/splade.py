"""SPLADE: a weight for each entry of the vocabulary, out of the logits of a masked language model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from carpool.engine.packing import PackedBatch
from carpool.engine.poolers.pooler import Pooled, token_rows
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import Splade
from carpool.engine.staging import upload
from carpool.kernels import ops

_MOST_LOGITS = 1 << 23  # at a time, 32 MiB of float32: 274 tokens of BERT's vocabulary, 33 of XLM-RoBERTa's


class SpladePool:
    """[V] a text, none below 0. There is nothing in it to normalise or to cut."""

    def __init__(self, head: nn.Module, width: int, splade: Splade) -> None:
        """`head` takes float32 rows [R, H] to logits [R, `width`]."""
        self._head = head
        self._width = width
        self._splade = splade

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        rows, lengths = token_rows(hidden, packed, places)
        sums, twice = self._splade.strategy == "sum", self._splade.twice
        chunks = list(_chunks(lengths, max(1, _MOST_LOGITS // self._width)))
        every = upload(hidden.device, *(np.array(chunk.bounds, np.int32) for chunk in chunks))
        # Where a weight begins, as a maximum and as a sum: ReLU leaves nothing below.
        weights = torch.zeros(len(places), self._width, device=hidden.device)
        for chunk, bounds in zip(chunks, every, strict=True):
            logits = self._head(rows[chunk.rows].float())
            part = ops.sparse_rows(logits, bounds, sums=sums, twice=twice)
            so_far = weights[chunk.texts]
            torch.add(so_far, part, out=so_far) if sums else torch.maximum(so_far, part, out=so_far)
        return Pooled((self._largest(weights),), lambda arrays: list(arrays[0]))

    def _largest(self, weights: Tensor) -> Tensor:
        most = self._splade.most
        if most is None or most >= self._width:
            return weights
        top = weights.topk(most, dim=1)
        return torch.zeros_like(weights).scatter_(1, top.indices, top.values)


class _Chunk(NamedTuple):
    """`rows` of all, which are of these `texts`, whose parts in the chunk end to end have these `bounds`."""

    rows: slice
    texts: slice
    bounds: list[int]


def _chunks(lengths: Seq[int], size: int) -> list[_Chunk]:
    """All rows of texts of these lengths, so many at a time."""
    chunks = []
    texts = list(pairwise(accumulate(lengths, initial=0)))
    for start in range(0, sum(lengths), size):
        end = min(start + size, sum(lengths))
        own = [i for i, (first, last) in enumerate(texts) if first < end and last > start]
        bounds = [0, *(min(texts[i][1], end) - start for i in own)]
        chunks.append(_Chunk(slice(start, end), slice(own[0], own[-1] + 1), bounds))
    return chunks
