"""Single rows of a packed row: those that are named, and where those of one token are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from carpool.kernels.reference.outputs import Output, finish_rows


def gather_rows(
    hidden: Tensor, rows: Tensor | None, widths: Tensor, normalize: Tensor, output: Output = "float32"
) -> tuple[Tensor, Tensor]:
    """Single rows of hidden [T, H], int32 `rows` [R] or None for all of them; else as `finish_rows`."""
    chosen = hidden if rows is None else hidden[rows.long()]
    return finish_rows(chosen.float(), widths, normalize, output)


def step_rows(token_ids: Tensor, cu_seqlens: Tensor, tag: int) -> tuple[Tensor, Tensor]:
    """Where the tokens `tag` are: int64 token_ids [T], cu_seqlens int32 [B+1] → int32 rows [R], bounds [B+1].

    The rows of sequence b are those from bounds[b] to bounds[b+1].
    """
    hits = token_ids == tag
    before = F.pad(hits.cumsum(0), (1, 0))
    return hits.nonzero()[:, 0].int(), before[cu_seqlens.long()].int()
