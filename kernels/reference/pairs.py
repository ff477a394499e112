"""Scores of pairs: of two vectors, and of the tokens of two texts."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_pairs(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosines of rows in_a[p] of a [A, H] and in_b[p] of b [B, H]: int32 [P] each → float32 [P]."""
    one, other = a.float()[in_a.long()], b.float()[in_b.long()]
    cosine: Tensor = (one * other).sum(1) / one.norm(dim=1).clamp_min(eps) / other.norm(dim=1).clamp_min(eps)
    return cosine


def maxsim(
    queries: Tensor,
    query_bounds: Tensor,
    documents: Tensor,
    document_bounds: Tensor,
    in_queries: Tensor,
    in_documents: Tensor,
) -> Tensor:
    """Late interaction: over a query's tokens the sum of the largest product with a token of the document.

    queries [Q, H] and documents [D, H] packed, with int32 bounds of one more than there are of each; pairs are
    in_queries and in_documents, int32 [P] → float32 [P]. 0 where either has no tokens.
    """
    of_query, of_document = query_bounds.tolist(), document_bounds.tolist()
    scores = queries.new_zeros(len(in_queries), dtype=torch.float32)
    for pair, (q, d) in enumerate(zip(in_queries.tolist(), in_documents.tolist(), strict=True)):
        query = queries[of_query[q] : of_query[q + 1]].float()
        document = documents[of_document[d] : of_document[d + 1]].float()
        if len(query) and len(document):
            scores[pair] = (query @ document.T).amax(1).sum()
    return scores
