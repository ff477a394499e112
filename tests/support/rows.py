"""Rows: layouts of packed rows, for tests that have no batch to make one of."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate, groupby

import torch

from carpool.kernels.layout import Layout


def laid_out(lengths: Seq[int], unseen: Seq[int | None] = ()) -> Layout:
    """The layout of a row of sequences of these lengths, on the CPU."""
    seen = [
        length if place is None else place
        for length, place in zip(lengths, unseen or [None] * len(lengths), strict=True)
    ]
    return Layout(
        runs=tuple((length, len(list(same))) for length, same in groupby(lengths)),
        longest=max(lengths),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        unseen=tuple(unseen),
        seen=torch.tensor(seen, dtype=torch.int32) if unseen else None,
    )
