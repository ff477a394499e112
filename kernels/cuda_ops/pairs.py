"""Scores of pairs on a CUDA device (kernels/cuda/pairs.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import launch
from carpool.kernels.cuda_ops.arguments import a_warp_each, alike, bounds_of, element_of, flat


def cosine_pairs(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor, eps: float = 1e-8) -> Tensor:
    """See `kernels.reference.cosine_pairs`."""
    columns = alike(a, b)
    count = len(in_a)
    flat(count, in_a=in_a, in_b=in_b)
    out = torch.empty(count, dtype=torch.float32, device=a.device)
    if count:
        grid = a_warp_each("cosine_pairs", count)
        launch.run("cosine_pairs", (element_of("a", a),), grid, a, b, in_a, in_b, out, count, columns, eps)
    return out


def maxsim(
    queries: Tensor,
    query_bounds: Tensor,
    documents: Tensor,
    document_bounds: Tensor,
    in_queries: Tensor,
    in_documents: Tensor,
) -> Tensor:
    """See `kernels.reference.maxsim`."""
    columns = alike(queries, documents)
    bounds_of(query_bounds), bounds_of(document_bounds)
    count = len(in_queries)
    flat(count, in_queries=in_queries, in_documents=in_documents)
    out = torch.empty(count, dtype=torch.float32, device=queries.device)
    if count:
        launch.run(
            "maxsim", (element_of("queries", queries),), (count,),
            queries, query_bounds, documents, document_bounds, in_queries, in_documents, out, columns,
        )  # fmt: skip
    return out
