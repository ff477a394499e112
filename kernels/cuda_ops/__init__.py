"""The operations of `kernels.reference` on a CUDA device, under their names and with their signatures.

A file here is one source in kernels/cuda/.
Each checks what its kernel takes for granted, makes the outputs and launches. Values that are on the device, such as
bounds and indices, are trusted: to look at them would make the host wait for it. What a kernel cannot take is a
LaunchError, and for the twin to do.
"""

from __future__ import annotations

from carpool.kernels.cuda_ops.arguments import WIDEST
from carpool.kernels.cuda_ops.attention import packed_attention, paged_attention
from carpool.kernels.cuda_ops.gather import gather_rows, step_rows
from carpool.kernels.cuda_ops.heads import activate_rows, sparse_rows
from carpool.kernels.cuda_ops.layers import gated, norm_rows, rotary
from carpool.kernels.cuda_ops.paged import kv_gather, kv_write
from carpool.kernels.cuda_ops.pairs import cosine_pairs, maxsim
from carpool.kernels.cuda_ops.pool import LONG, pool_rows

__all__ = [
    "LONG",
    "WIDEST",
    "activate_rows",
    "cosine_pairs",
    "gated",
    "gather_rows",
    "kv_gather",
    "kv_write",
    "maxsim",
    "norm_rows",
    "packed_attention",
    "paged_attention",
    "pool_rows",
    "rotary",
    "sparse_rows",
    "step_rows",
]
