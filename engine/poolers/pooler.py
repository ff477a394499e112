"""Pooler: hidden states of a packed batch to one result a sequence, whatever mix of tasks rides in it.

Each task has a pool: a method (which rows) and the heads behind it (what becomes of them). All of it is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from carpool.engine.params import Task
from carpool.engine.sequence import Sequence

Rows = list[NDArray[np.float32]]


class Pool(Protocol):
    """Serves one task for the sequences of a batch that ask for it."""

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, places: Seq[int], sequences: Seq[Sequence]
    ) -> Rows:
        """hidden [T, H], cu_seqlens [B+1]; the hidden states of `sequences[i]` are those at `places[i]` of the B.

        Returns one float32 array each: [D] for a whole text, [tokens, D] for a token task.
        """


class Pooler:
    """Deals the sequences of a batch out to their tasks' pools."""

    def __init__(self, pools: Mapping[Task, Pool]) -> None:
        self._pools = pools

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, sequences: Seq[Sequence], places: Seq[int]
    ) -> Rows:
        """`places` as a Pool has them: sequences that ask several things of one text share its hidden states."""
        results: dict[int, NDArray[np.float32]] = {}
        for task, pool in self._pools.items():
            asking = [i for i, seq in enumerate(sequences) if seq.task == task]
            if asking:
                rows = pool(hidden, cu_seqlens, [places[i] for i in asking], [sequences[i] for i in asking])
                results.update(zip(asking, rows, strict=True))
        return [results[i] for i in range(len(sequences))]


def token_rows(cu_seqlens: Tensor, places: Seq[int]) -> tuple[list[int], list[int]]:
    """Which rows of a packed batch belong to the sequences at `places`, and how many each has."""
    bounds = cu_seqlens.tolist()
    lengths = [bounds[i + 1] - bounds[i] for i in places]
    return [row for i in places for row in range(bounds[i], bounds[i + 1])], lengths


def split(rows: NDArray[np.float32], lengths: Seq[int]) -> Rows:
    """Views of `rows` [sum(lengths), D], one of each length."""
    return np.split(rows, np.cumsum(lengths)[:-1])
