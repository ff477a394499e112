"""Marked: a vector at each mark in a prompt, where the model was trained to say what it made of the text before it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from carpool.engine.packing import PackedBatch
from carpool.engine.poolers.embed import EmbedHead
from carpool.engine.poolers.pooler import Pooled
from carpool.engine.sequence import Sequence
from carpool.engine.staging import upload


class MarkedPool:
    """As many vectors a prompt as it has marks, in their order: none, if it has none."""

    def __init__(self, head: EmbedHead, marks: frozenset[int]) -> None:
        """`marks` are ids of tokens."""
        self._head = head
        self._marks = np.array(sorted(marks), np.int64)

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        found = [
            packed.bounds[place] + np.flatnonzero(np.isin(seq.token_ids, self._marks))
            for place, seq in zip(places, sequences, strict=True)
        ]
        (index,) = upload(hidden.device, np.concatenate(found))
        vectors = self._head.dense(hidden[index].float())
        return self._head.finish(vectors, None, sequences, list(map(len, found)))
