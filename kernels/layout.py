"""Layout: where the sequences of a packed row begin and end, as the host knows it and as the device reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Pages = tuple[
    Tensor, Tensor
]  # the keys and the values of one layer: P pages of S tokens, [P, S, N_kv, D] each


@dataclass(frozen=True, slots=True)
class Past:
    """The last `B'` sequences of a row, of which more is kept than the row has: their tokens are the last of what is.

    On the host: `start`, the token of the row with which they begin; the `longest` of their lengths in the row. On the
    row's device: int32 `pages` [B', M], those of each sequence in order; `cu_seqlens` int32 [B'+1], the cumulative
    lengths in the row, from 0; `key_lengths` int32 [B'], the tokens that each has so far, those in the row included.
    `others` is the layout of the sequences before them, None if there are none.
    """

    start: int
    longest: int
    pages: Tensor
    cu_seqlens: Tensor
    key_lengths: Tensor
    others: Layout | None


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the keys and values of a row are kept. In every layer all are written before any are read.

    `layers`: the pages of each layer that attends, in order. `slots` int64 [T]: where each token's go, page * S +
    place; -1 for those that are not kept.
    """

    layers: tuple[Pages, ...]
    slots: Tensor
    past: Past | None


@dataclass(frozen=True, slots=True)
class Layout:
    """A row of `B` sequences, `T` tokens. Both halves say the same: the host never asks the device for its own.

    On the host: `runs` of (length, count), neighbouring sequences of equal length; the `longest` of the lengths;
    `unseen`, from where on each sequence's tokens are not looked at, None or () for nowhere. On the row's device:
    `cu_seqlens` int32 [B+1], the cumulative lengths from 0; `positions` int64 [T], each token's place in its sequence;
    `seen` int32 [B], how many of each sequence's tokens are looked at, None where all are.

    `kept`: where keys and values are kept, None for a row of which nothing is. A sequence that has a past is in the row
    with its last tokens, and `positions` go on from there. `wanted` int64 [R], on the device: the tokens whose hidden
    states are read in the end, None for all.
    """

    runs: tuple[tuple[int, int], ...]
    longest: int
    cu_seqlens: Tensor
    positions: Tensor
    unseen: tuple[int | None, ...] = ()
    seen: Tensor | None = None
    kept: Kept | None = None
    wanted: Tensor | None = None

    def distances(self, device: torch.device) -> Tensor:
        """int64 [2M - 1], M the longest length: how far a key can stand behind its query, from 1 - M to M - 1."""
        return torch.arange(1 - self.longest, self.longest, device=device)

    def partly_seen(self) -> Iterator[tuple[slice, int]]:
        """The sequences of which only the first tokens are looked at: where in the row, and how many those are."""
        if self.unseen:
            ends = accumulate(length for length, count in self.runs for _ in range(count))
            for (start, end), seen in zip(pairwise((0, *ends)), self.unseen, strict=True):
                if seen is not None:
                    yield slice(start, end), seen

    def hide(self, rows: Tensor) -> Tensor:
        """[T, H] with zeros for tokens that are not looked at: for layers that mix tokens without attention."""
        for own, seen in self.partly_seen():
            rows = rows.clone()
            rows[own][seen:] = 0
        return rows

    def split(self, rows: Tensor) -> Iterator[Tensor]:
        """[T, H] → a [count, length, H] for each run."""
        sizes = [length * count for length, count in self.runs]
        for (length, count), run in zip(self.runs, torch.split(rows, sizes), strict=True):
            yield run.view(count, length, -1)
