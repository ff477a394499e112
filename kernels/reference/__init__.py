"""Every operation on packed rows in plain torch: the specification, the fallback, and the tests' oracle.

A file here is one family. Those that CUDA kernels compute are in `kernels.cuda_ops` too, in files of the same names.

Shapes: `T` tokens in the batch, `B` sequences, `N` heads, `D` head or output dimension, `H` hidden.
"""

from __future__ import annotations

from carpool.kernels.reference.attention import (
    attention_to_first,
    packed_attention,
    paged_attention,
    varlen_attention,
)
from carpool.kernels.reference.disentangled import disentangled_attention
from carpool.kernels.reference.gather import gather_rows, step_rows
from carpool.kernels.reference.heads import IDENTITY, SIGMOID, SOFTMAX, activate_rows, sparse_rows
from carpool.kernels.reference.layers import Activation, gated, norm_rows, rotary
from carpool.kernels.reference.outputs import OUTPUTS, Output, cut_and_normalize, finish_rows
from carpool.kernels.reference.paged import kv_gather, kv_write
from carpool.kernels.reference.pairs import cosine_pairs, maxsim
from carpool.kernels.reference.pool import (
    CLS,
    LAST,
    MEAN,
    pool_cls,
    pool_last,
    pool_max,
    pool_mean,
    pool_mean_sqrt_len,
    pool_rows,
    pool_sum,
    pool_weighted_mean,
)
from carpool.kernels.reference.segments import segment_ids

__all__ = [
    "CLS",
    "IDENTITY",
    "LAST",
    "MEAN",
    "OUTPUTS",
    "SIGMOID",
    "SOFTMAX",
    "Activation",
    "Output",
    "activate_rows",
    "attention_to_first",
    "cosine_pairs",
    "cut_and_normalize",
    "disentangled_attention",
    "finish_rows",
    "gated",
    "gather_rows",
    "kv_gather",
    "kv_write",
    "maxsim",
    "norm_rows",
    "packed_attention",
    "paged_attention",
    "pool_cls",
    "pool_last",
    "pool_max",
    "pool_mean",
    "pool_mean_sqrt_len",
    "pool_rows",
    "pool_sum",
    "pool_weighted_mean",
    "rotary",
    "segment_ids",
    "sparse_rows",
    "step_rows",
    "varlen_attention",
]
