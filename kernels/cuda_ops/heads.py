"""What stands on logits, on a CUDA device (kernels/cuda/heads.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import cuda_table, launch
from carpool.kernels.cuda_ops.arguments import a_warp_each, bounds_of, element_of, flat, rows_of


def activate_rows(logits: Tensor, kinds: Tensor, mean: float = 0.0, sigma: float = 1.0) -> Tensor:
    """See `kernels.reference.activate_rows`."""
    rows, columns = rows_of("logits", logits, aligned=False)
    flat(rows, kinds=kinds)
    out = torch.empty_like(logits, dtype=torch.float32)
    if rows:
        grid = a_warp_each("activate_rows", rows)
        launch.run(
            "activate_rows",
            (element_of("logits", logits),),
            grid,
            logits,
            kinds,
            out,
            rows,
            columns,
            mean,
            sigma,
        )
    return out


def sparse_rows(logits: Tensor, cu_seqlens: Tensor, *, sums: bool = False, twice: bool = False) -> Tensor:
    """See `kernels.reference.sparse_rows`."""
    _, columns = rows_of("logits", logits, aligned=False)
    count = bounds_of(cu_seqlens)
    out = torch.empty((count, columns), dtype=torch.float32, device=logits.device)
    if count:
        grid = (-(-columns // cuda_table.BY_NAME["sparse_rows"].threads), count)
        launch.run(
            "sparse_rows", (element_of("logits", logits),), grid,
            logits, cu_seqlens, out, columns, int(sums), int(twice),
        )  # fmt: skip
    return out
