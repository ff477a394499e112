"""Pooling on a CUDA device (kernels/cuda/pool.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import cuda_table, launch
from carpool.kernels.cuda_ops.arguments import EPS, bounds_of, element_of, flat, outputs_of, rows_of
from carpool.kernels.launch import ELEMENTS
from carpool.kernels.reference import Output

LONG = 512  # tokens from which on a sequence's mean is taken in two passes


def pool_rows(
    hidden: Tensor,
    cu_seqlens: Tensor,
    modes: Tensor,
    widths: Tensor,
    normalize: Tensor,
    output: Output = "float32",
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.pool_rows`."""
    tokens, columns = rows_of("hidden", hidden)
    count = bounds_of(cu_seqlens)
    flat(count, modes=modes, widths=widths, normalize=normalize)
    out, scales = outputs_of(count, columns, output, hidden.device)
    if not count:
        return out, scales
    element = element_of("hidden", hidden)
    kernel = cuda_table.BY_NAME["pool_rows"]
    shared = cuda_table.pooling_shared(columns, 16 // hidden.element_size(), kernel.threads)
    partial = None
    if longest is not None and longest > LONG:
        chunks = tokens // cuda_table.CHUNK + count
        partial = hidden.new_empty((chunks, columns), dtype=torch.float32)
        launch.run(
            "pool_split", (element,), (chunks,),
            hidden, cu_seqlens, modes, widths, partial, count, columns,
            shared=shared,
        )  # fmt: skip
        shared = max(shared, cuda_table.pooling_shared(columns, 4, kernel.threads))
    launch.run(
        "pool_rows", (element, ELEMENTS[out.dtype]), (count,),
        hidden, cu_seqlens, modes, widths, normalize, partial, out, scales, columns, EPS,
        shared=shared,
    )  # fmt: skip
    return out, scales
