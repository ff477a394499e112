"""Single rows on a CUDA device (kernels/cuda/gather.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import launch
from carpool.kernels.cuda_ops.arguments import (
    EPS,
    a_warp_each,
    bounds_of,
    element_of,
    flat,
    outputs_of,
    rows_of,
)
from carpool.kernels.launch import ELEMENTS
from carpool.kernels.reference import Output


def gather_rows(
    hidden: Tensor, rows: Tensor | None, widths: Tensor, normalize: Tensor, output: Output = "float32"
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.gather_rows`."""
    tokens, columns = rows_of("hidden", hidden, aligned=False)
    count = tokens if rows is None else len(rows)
    flat(count, widths=widths, normalize=normalize)
    if rows is not None:
        flat(count, rows=rows)
    out, scales = outputs_of(count, columns, output, hidden.device)
    if count:
        launch.run(
            "gather_rows", (element_of("hidden", hidden), ELEMENTS[out.dtype]), a_warp_each("gather_rows", count),
            hidden, rows, widths, normalize, out, scales, count, columns, EPS,
        )  # fmt: skip
    return out, scales


def step_rows(token_ids: Tensor, cu_seqlens: Tensor, tag: int) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.step_rows`. The host waits for the device once: it must know how many there are."""
    count = bounds_of(cu_seqlens)
    flat(len(token_ids), token_ids=token_ids)
    bounds = torch.zeros(count + 1, dtype=torch.int32, device=token_ids.device)
    if not count:
        return bounds[:0], bounds
    grid = a_warp_each("step_count", count)
    counts = torch.empty(count, dtype=torch.int32, device=token_ids.device)
    launch.run("step_count", (), grid, token_ids, cu_seqlens, counts, count, tag)
    torch.cumsum(counts, 0, dtype=torch.int32, out=bounds[1:])
    rows = torch.empty(int(bounds[-1]), dtype=torch.int32, device=token_ids.device)
    if len(rows):
        launch.run("step_fill", (), grid, token_ids, cu_seqlens, bounds, rows, count, tag)
    return rows, bounds
