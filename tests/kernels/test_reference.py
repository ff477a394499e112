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
from carpool.kernels.reference import (
    attention_to_first,
    cut_and_normalize,
    disentangled_attention,
    varlen_attention,
)

Method = Callable[[Tensor, Tensor], Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(runs: list[tuple[int, int]]) -> list[int]:
    return [length for length, count in runs for _ in range(count)]


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, causal: bool,
    window: int | None, softcap: float | None, bias: Tensor | None = None, sinks: Tensor | None = None,
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
                if bias is not None:
                    scores = scores + torch.stack(
                        [bias[head, bias.shape[1] // 2 + j - i].double() for j in seen]
                    )
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head, None].double()])
                weights = torch.softmax(scores, 0)[: len(seen)]
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
    biased=st.none() | st.integers(0, 3),
    sinking=st.booleans(),
    threshold=st.sampled_from([0, 3, 96]),
    held=st.sampled_from([1, 20, 1 << 22]),
)
def test_attention_is_what_the_plain_loop_says(
    runs: list[tuple[int, int]], kv_heads: int, group: int, width: int, scale: float, causal: bool,
    window: int | None, softcap: float | None, biased: int | None, sinking: bool, threshold: int, held: int,
) -> None:  # fmt: skip
    """`biased`: how many tokens longer than any text the bias is for; `held`: how many scores at once."""
    lengths = spread(runs)
    tokens = sum(lengths)
    query = 2 * rand(tokens, kv_heads * group, width, seed=1)
    key, value = 2 * rand(tokens, kv_heads, width, seed=2), rand(tokens, kv_heads, width, seed=3)
    heads = kv_heads * group
    bias = None if biased is None else 2 * rand(heads, 2 * (max(lengths) + biased) - 1, seed=4)
    sinks = rand(heads, seed=5) if sinking else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference, "_SHORT", threshold)  # so that both roads are taken by short sequences
        patched.setattr(reference, "_SCORES", held)
        out = varlen_attention(
            query,
            key,
            value,
            runs,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            bias=bias,
            sinks=sinks,
        )
    expected = naive_attention(query, key, value, lengths, scale, causal, window, softcap, bias, sinks)
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


def test_a_bias_that_is_too_short_for_a_text_is_an_error() -> None:
    x = rand(5, 1, 4)
    for width in (7, 8, 10):  # for 4 tokens; of no middle
        with pytest.raises(ValueError, match=f"{width} distances do not cover"):
            varlen_attention(x, x, x, [(5, 1)], scale=1.0, bias=torch.zeros(1, width))


def test_of_long_texts_only_a_part_of_the_scores_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    softmax = torch.softmax

    def counted(scores: Tensor, dim: int) -> Tensor:
        sizes.append(scores.numel())
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", counted)
    x = rand(3000, 2, 4)
    tables = rand(8, 2, 4, seed=1)
    varlen_attention(x, x, x, [(3000, 1)], scale=1.0, bias=torch.zeros(2, 5999))
    disentangled_attention(
        x, x, x, [(3000, 1)], scale=1.0, position_keys=tables, position_queries=tables,
        rows_of=(4 - torch.arange(-2999, 3000)).clamp(0, 7),
    )  # fmt: skip
    assert sum(sizes) == 2 * 2 * 3000 * 3000
    assert max(sizes) <= reference._SCORES


# ── contents and positions ───────────────────────────────────────────────────────────────────────────────────


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
        patched.setattr(reference, "_SCORES", held)
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


@pytest.mark.parametrize("kind", ["plain", "causal", "window", "softcap", "bias", "sinks", "grouped"])
def test_attention_to_the_first_tokens_is_attention_with_the_others_masked(kind: str) -> None:
    length, seen, heads, size = 9, 4, 4, 8
    kv_heads = 2 if kind == "grouped" else heads
    query, key, value = (rand(length, n, size, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    kinds: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window": 5},
        "softcap": {"softcap": 2.0},
        "bias": {"bias": rand(heads, 2 * length - 1, seed=7)},
        "sinks": {"sinks": rand(heads, seed=8)},
    }
    options = kinds.get(kind, {})
    found = attention_to_first(query, key, value, seen, scale=0.3, **options)
    repeat = heads // kv_heads
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, k) * 0.3
    if kind == "softcap":
        scores = 2.0 * torch.tanh(scores / 2.0)
    since = torch.arange(length)[:, None] - torch.arange(length)  # how far a key stands before its query
    if kind == "bias":
        scores = scores + options["bias"][:, length - 1 - since]
    hidden = torch.arange(length).expand(length, length) >= seen
    if kind == "causal":
        hidden = hidden | (since < 0)
    if kind == "window":
        hidden = hidden | (since.abs() >= 5)
    scores = scores.masked_fill(hidden, float("-inf"))
    if kind == "sinks":
        scores = torch.cat([scores, options["sinks"][:, None, None].expand(heads, length, 1)], dim=-1)
        v = torch.cat([v, torch.zeros(1, heads, size)])
    expected = torch.einsum("nqk,knd->qnd", torch.softmax(scores, -1).nan_to_num(), v)
    assert torch.allclose(found, expected, atol=1e-5)
    if kind == "window":
        assert (found[-1] == 0).all(), "the last token sees none of the first"
