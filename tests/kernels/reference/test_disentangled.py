"""Attention of contents and positions against a loop so plain that it cannot be wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carpool.kernels import reference
from carpool.kernels.reference import disentangled_attention
from near import rand


def spread(runs: list[tuple[int, int]]) -> list[int]:
    return [length for length, count in runs for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    span=st.integers(1, 9),
    farther=st.integers(0, 2),
    keys=st.booleans(),
    queries=st.booleans(),
    held=st.sampled_from([1, 20, 1 << 22]),
)
def test_disentangled_attention_is_what_the_plain_loop_says(
    runs: list[tuple[int, int]], heads: int, span: int, farther: int, keys: bool, queries: bool, held: int
) -> None:
    lengths = spread(runs)
    query, key, value = (2 * rand(sum(lengths), heads, 4, seed=i) for i in range(3))
    by_key = rand(2 * span, heads, 4, seed=4) if keys else None
    by_query = rand(2 * span, heads, 4, seed=5) if queries else None
    reach = max(lengths) + farther
    rows_of = (span - torch.arange(1 - reach, reach)).clamp(0, 2 * span - 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference.scores, "_SCORES", held)
        out = disentangled_attention(
            query,
            key,
            value,
            runs,
            scale=0.7,
            rows_of=rows_of,
            position_keys=by_key,
            position_queries=by_query,
        )
    expected = torch.empty_like(query, dtype=torch.float64)
    start = 0
    for length in lengths:
        own = range(start, start + length)
        for i in own:
            for head in range(heads):
                scores = []
                for j in own:
                    row = min(max(span + i - j, 0), 2 * span - 1)
                    score = query[i, head] @ key[j, head]
                    if by_key is not None:
                        score = score + query[i, head] @ by_key[row, head]
                    if by_query is not None:
                        score = score + key[j, head] @ by_query[row, head]
                    scores.append(0.7 * score.double())
                expected[i, head] = torch.stack(scores).softmax(0) @ value[own, head].double()
        start += length
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
