"""Attention against loops so plain that they cannot be wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import reference
from carpool.kernels.reference import attention_to_first, disentangled_attention, varlen_attention
from near import rand


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
        patched.setattr(
            reference.scores, "_SHORT", threshold
        )  # so that both roads are taken by short sequences
        patched.setattr(reference.scores, "_SCORES", held)
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
    assert max(sizes) <= reference.scores._SCORES


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
