"""The reference kernels against loops so plain that they cannot be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import reference
from carpool.kernels.reference import cut_and_normalize, varlen_attention

Method = Callable[[Tensor, Tensor], Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(runs: list[tuple[int, int]]) -> list[int]:
    return [length for length, count in runs for _ in range(count)]


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, causal: bool,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """One query, one head, one key at a time, in float64."""
    q, k, v = (x.double() for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            for head in range(q.shape[1]):
                seen = [
                    j
                    for j in range(start, start + length)
                    if (j <= i or not causal) and (window is None or abs(i - j) < window)
                ]
                scores = torch.stack([q[i, head] @ k[j, head // group] * scale for j in seen])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(scores, 0)
                out[i, head] = sum(w * v[j, head // group] for w, j in zip(weights, seen, strict=True))
        start += length
    return out


@settings(max_examples=80, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([1, 4]),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 9),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    threshold=st.sampled_from([0, 3, 96]),
)
def test_attention_is_what_the_plain_loop_says(
    runs: list[tuple[int, int]], kv_heads: int, group: int, width: int, scale: float, causal: bool,
    window: int | None, softcap: float | None, threshold: int,
) -> None:  # fmt: skip
    lengths = spread(runs)
    tokens = sum(lengths)
    query = 2 * rand(tokens, kv_heads * group, width, seed=1)
    key, value = 2 * rand(tokens, kv_heads, width, seed=2), rand(tokens, kv_heads, width, seed=3)
    before = reference._SHORT
    reference._SHORT = threshold  # so that both roads are taken by short sequences
    try:
        out = varlen_attention(
            query, key, value, runs, scale=scale, causal=causal, window=window, softcap=softcap
        )
    finally:
        reference._SHORT = before
    expected = naive_attention(query, key, value, lengths, scale, causal, window, softcap)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [95, 96, 97, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_both_roads_agree_where_they_meet(length: int, causal: bool) -> None:
    x = rand(length, 2, 8)
    out = varlen_attention(x, x, x, [(length, 1)], scale=0.3, causal=causal)
    scores = torch.einsum("inD,jnD->nij", x.double(), x.double()) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    expected = torch.einsum("nij,jnD->inD", scores.softmax(-1), x.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_rounded_only_on_the_way_in_and_out(dtype: torch.dtype) -> None:
    query, key, value = (rand(12, 2, 8, seed=i).to(dtype) for i in range(3))
    out = varlen_attention(query, key, value, [(5, 1), (7, 1)], scale=1.0)
    exact = naive_attention(query, key, value, [5, 7], 1.0, False, None, None)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_a_neighbours_nan_stays_with_the_neighbour() -> None:
    x = rand(6, 1, 4)
    x[4] = float("nan")
    out = varlen_attention(x, x, x, [(3, 2)], scale=1.0)
    assert torch.isfinite(out[:3]).all()
    assert torch.isnan(out[3:]).all()


def test_the_inputs_are_not_written_to() -> None:
    query, key, value = (rand(6, 2, 4, seed=i) for i in range(3))
    copies = [x.clone() for x in (query, key, value)]
    varlen_attention(query, key, value, [(3, 2)], scale=1.0, causal=True, window=2, softcap=3.0)
    for x, copy in zip((query, key, value), copies, strict=True):
        assert torch.equal(x, copy)


# ── pooling ──────────────────────────────────────────────────────────────────────────────────────────────────

ONE_BY_ONE: dict[Method, Callable[[Tensor], Any]] = {
    reference.pool_cls: lambda rows: rows[0],
    reference.pool_last: lambda rows: rows[-1],
    reference.pool_sum: lambda rows: rows.sum(0),
    reference.pool_mean: lambda rows: rows.mean(0),
    reference.pool_mean_sqrt_len: lambda rows: rows.sum(0) / math.sqrt(len(rows)),
    reference.pool_weighted_mean: lambda rows: (
        sum(i * row for i, row in enumerate(rows, 1)) / sum(range(1, len(rows) + 1))
    ),
    reference.pool_max: lambda rows: rows.max(0).values,
}


@pytest.mark.parametrize("method", ONE_BY_ONE, ids=lambda method: method.__name__)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    below_zero=st.booleans(),
)
def test_pooling_is_what_each_sequence_gives_alone(
    method: Method, lengths: list[int], dtype: torch.dtype, below_zero: bool
) -> None:
    hidden = rand(sum(lengths), 6).to(dtype)
    if below_zero:  # a maximum that starts from zero would show here
        hidden = -hidden.abs() - 1
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    pooled = method(hidden, cu_seqlens)
    expected = torch.stack([ONE_BY_ONE[method](rows) for rows in torch.split(hidden.double(), lengths)])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_mean_of_many_16_bit_rows_is_summed_in_float32() -> None:
    hidden = torch.ones(5000, 1, dtype=torch.bfloat16)  # a bfloat16 sum stops growing at 256
    assert reference.pool_mean(hidden, torch.tensor([0, 5000], dtype=torch.int32)).item() == 1.0


def test_segment_ids_name_the_owner_of_each_token() -> None:
    assert reference.segment_ids(torch.tensor([0, 2, 3, 6], dtype=torch.int32)).tolist() == [0, 0, 1, 2, 2, 2]


# ── finishing ────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([0.0, 1e-20, 1, 1e15]),
)
def test_each_row_is_cut_then_normalised_by_its_own_wish(rows: list[tuple[int, bool]], size: float) -> None:
    vectors = rand(len(rows), 5) * size
    before = vectors.clone()
    widths, normalize = torch.tensor([w for w, _ in rows]), torch.tensor([n for _, n in rows])
    finished = cut_and_normalize(vectors, widths, normalize)
    assert torch.equal(vectors, before), "the input is not written to"
    for row, vector, (width, wish) in zip(finished.double(), vectors.double(), rows, strict=True):
        kept = vector[:width]
        expected = kept / kept.norm().clamp_min(1e-12) if wish else kept
        torch.testing.assert_close(row[:width], expected, rtol=1e-5, atol=1e-30)
        assert (row[width:] == 0).all()


def test_one_rows_nan_is_not_another_rows_problem() -> None:
    vectors = torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [0.0, 2.0]])
    finished = cut_and_normalize(vectors, torch.tensor([2, 2, 2]), torch.tensor([True, True, True]))
    assert finished[[0, 2]].tolist() == [[1.0, 0.0], [0.0, 1.0]]
