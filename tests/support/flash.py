"""Flash: torch's varlen_attn from its definition, on a CPU, in float32, and strict in what it takes.

Written from the documented meaning of every argument, not from our twin: how windows are counted here is what torch
documents and its own tests check against a mask.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> Tensor:
    tokens, heads, size = query.shape
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert key.dtype == value.dtype == query.dtype
    assert key.shape == value.shape == (tokens, key.shape[1], size)
    assert size % 8 == 0 <= 256 - size
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert heads == key.shape[1] or (enable_gqa and heads % key.shape[1] == 0)
    assert num_splits == 1, "more would be chosen by the longest sequence: results would depend on company"
    for bounds, most in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert (int(bounds[0]), int(bounds[-1])) == (0, tokens)
        assert isinstance(most, int)
        assert int(bounds.diff().max()) <= most
    assert torch.equal(cu_seq_q, cu_seq_k)
    scale = size**-0.5 if scale is None else scale
    group = heads // key.shape[1]
    left, right = window_size
    out = torch.empty_like(query)
    edges = cu_seq_q.tolist()
    for start, end in pairwise(edges):
        place = torch.arange(end - start)
        ahead = place[None, :] - place[:, None]  # how far a key stands after its query
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden |= -ahead > left
        if right >= 0:
            hidden |= ahead > right
        for head in range(heads):
            own = slice(start, end), head
            other = slice(start, end), head // group
            scores = (query[own].float() @ key[other].float().T * scale).masked_fill(hidden, -torch.inf)
            out[own] = (scores.softmax(-1) @ value[other].float()).to(out.dtype)
    return out
