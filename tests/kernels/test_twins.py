"""What the CUDA kernels are to compute, as kernels/reference.py has it, against loops too plain to be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import reference
from carpool.kernels.reference import CLS, IDENTITY, LAST, MEAN, SIGMOID, SOFTMAX, Activation, Output


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def close(found: Tensor, expected: Any, room: float = 1e-5) -> None:
    exact = expected if isinstance(expected, Tensor) else torch.tensor(np.array(expected))
    exact = exact.double().reshape(found.shape)
    torch.testing.assert_close(found.double(), exact, rtol=room, atol=room)


texts = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([CLS, LAST, MEAN]), st.integers(0, 6)), min_size=1)
)
def test_each_sequence_is_pooled_in_its_own_mode_and_width(texts: list[tuple[int, int, int]]) -> None:
    lengths, modes, widths = ([text[i] for text in texts] for i in range(3))
    hidden = rand(sum(lengths), 6)
    unit = torch.arange(len(texts)) % 2 == 0
    found, scales = reference.pool_rows(
        hidden, bounds(lengths), torch.tensor(modes, dtype=torch.int8),
        torch.tensor(widths, dtype=torch.int32), unit,
    )  # fmt: skip
    expected = np.zeros((len(texts), 6))
    for row, rows, mode, width, wish in zip(
        expected, torch.split(hidden.double(), lengths), modes, widths, unit, strict=True
    ):
        if len(rows):
            pooled = {CLS: rows[0], LAST: rows[-1], MEAN: rows.mean(0)}[mode].numpy()[:width]
            row[:width] = pooled / max(np.linalg.norm(pooled), 1e-12) if wish else pooled
    close(found, expected)
    assert scales.tolist() == [1.0] * len(texts)


@pytest.mark.parametrize("output", get_args(Output))
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_output_has_its_type_and_size(output: Output, count: int) -> None:
    widths, unit = torch.full((count,), 11, dtype=torch.int32), torch.ones(count, dtype=torch.bool)
    rows, scales = reference.finish_rows(rand(count, 11), widths, unit, output)
    assert rows.dtype == reference.OUTPUTS[output]
    assert rows.shape == (count, 2 if output == "binary" else 11)
    assert scales.shape == (count,)


def test_whole_numbers_times_their_scale_are_the_vector() -> None:
    vectors = rand(40, 24)
    vectors[3] = 0
    widths, unit = torch.arange(40, dtype=torch.int32) % 25, torch.arange(40) % 2 == 0
    exact, _ = reference.finish_rows(vectors, widths, unit, "float32")
    rows, scales = reference.finish_rows(vectors, widths, unit, "int8")
    some = exact.abs().amax(1) > 0
    assert (rows.int().abs().amax(1) == torch.where(some, 127, 0)).all(), (
        "the largest is 127, so no room is lost"
    )
    assert ((rows * scales[:, None] - exact).abs() <= 0.501 * scales[:, None]).all()
    assert (scales[~some] == 0).all()


def test_bits_are_as_numpy_packs_them() -> None:
    vectors = torch.cat([rand(6, 19), torch.zeros(1, 19)])
    widths, unit = torch.tensor([19, 19, 8, 1, 0, 12, 19], dtype=torch.int32), torch.ones(7, dtype=torch.bool)
    rows, _ = reference.finish_rows(vectors, widths, unit, "binary")
    bits = (vectors.numpy() >= 0) & (np.arange(19) < widths.numpy()[:, None])
    assert np.array_equal(rows.numpy(), np.packbits(bits, axis=1))


def test_gathered_rows_are_those_asked_for() -> None:
    hidden = rand(7, 4).bfloat16()
    widths, unit = torch.full((3,), 4, dtype=torch.int32), torch.zeros(3, dtype=torch.bool)
    picked = torch.tensor([6, 0, 6], dtype=torch.int32)
    assert torch.equal(reference.gather_rows(hidden, picked, widths, unit)[0], hidden[[6, 0, 6]].float())
    every = widths[:1].expand(7), unit[:1].expand(7)
    assert torch.equal(reference.gather_rows(hidden, None, *every)[0], hidden.float())


@given(texts, st.integers(0, 2))
def test_steps_are_where_the_tag_is(lengths: list[int], tag: int) -> None:
    ids = torch.randint(0, 3, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    rows, starts = reference.step_rows(ids, bounds(lengths), tag)
    assert rows.tolist() == [i for i, token in enumerate(ids.tolist()) if token == tag]
    assert starts.diff().tolist() == [part.tolist().count(tag) for part in torch.split(ids, lengths)]
    assert rows.dtype == starts.dtype == torch.int32


def test_logits_are_activated_row_by_row() -> None:
    logits = rand(3, 5)
    found = reference.activate_rows(
        logits, torch.tensor([IDENTITY, SIGMOID, SOFTMAX], dtype=torch.int8), 0.5, 2.0
    )
    plain = [[(x - 0.5) / 2 for x in row] for row in logits.tolist()]
    total = sum(map(math.exp, plain[2]))
    close(
        found, [plain[0], [1 / (1 + math.exp(-x)) for x in plain[1]], [math.exp(x) / total for x in plain[2]]]
    )


@given(texts, st.booleans(), st.booleans())
def test_sparse_weights_are_splades(lengths: list[int], sums: bool, twice: bool) -> None:
    logits = rand(sum(lengths), 4)
    expected = np.zeros((len(lengths), 4))
    for row, part in zip(expected, torch.split(logits, lengths), strict=True):
        for token in part.tolist():
            for c, x in enumerate(token):
                weight = math.log1p(max(x, 0))
                weight = math.log1p(weight) if twice else weight
                row[c] = row[c] + weight if sums else max(row[c], weight)
    close(reference.sparse_rows(logits, bounds(lengths), sums=sums, twice=twice), expected)


def test_cosines_of_pairs() -> None:
    a, b = rand(3, 4), rand(2, 4, seed=1)
    b[1] = 0
    places = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    one, other = a[2].tolist(), b[0].tolist()
    dot = sum(x * y for x, y in zip(one, other, strict=True))
    close(reference.cosine_pairs(a, b, *places), [dot / math.hypot(*one) / math.hypot(*other), 0])


def test_maxsim_is_the_sum_of_each_query_tokens_best() -> None:
    queries, documents = rand(5, 4), rand(6, 4, seed=1)
    pairs = [(0, 0), (1, 2), (2, 0), (0, 1)]
    found = reference.maxsim(
        queries, bounds([2, 3, 0]), documents, bounds([2, 0, 4]),
        *(torch.tensor(side, dtype=torch.int32) for side in zip(*pairs, strict=True)),
    )  # fmt: skip
    products = (queries.double() @ documents.double().T).tolist()
    first = sum(max(row[:2]) for row in products[:2])
    second = sum(max(row[2:]) for row in products[2:])
    close(found, [first, second, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_torchs_own(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (
        rand(4, 8).to(dtype),
        rand(4, 8, seed=1).to(dtype),
        rand(8, seed=2),
        rand(8, seed=3),
    )
    room = 1e-5 if dtype == torch.float32 else 2e-2
    layer, total = reference.norm_rows(x, residual, weight, bias, 1e-5, centred=True)
    assert total is not None
    assert torch.equal(total, x + residual)
    wide = (x + residual).double()
    close(layer, torch.nn.functional.layer_norm(wide, (8,), weight.double(), bias.double(), 1e-5), room)
    rms, total = reference.norm_rows(x, None, weight, None, 1e-5, centred=False)
    assert total is x
    assert reference.norm_rows(x, residual, weight, bias, 1e-5, centred=True, keep_sum=False)[1] is None
    close(rms, torch.nn.functional.rms_norm(x.double(), (8,), weight.double(), 1e-5), room)


@pytest.mark.parametrize("turned", [4, 6])
def test_rotary_turns_each_pair_by_its_angle(turned: int) -> None:
    x, angles = rand(3, 2, 6), rand(3, turned // 2, seed=1)
    full = torch.cat([angles, angles], 1)
    found = reference.rotary(x, full.cos(), full.sin())
    expected = x.double().clone()
    for t in range(3):
        for c in range(turned // 2):
            left, right, angle = x[t, :, c], x[t, :, c + turned // 2], angles[t, c]
            pair = torch.complex(left, right) * torch.polar(torch.ones(()), angle)
            expected[t, :, c], expected[t, :, c + turned // 2] = pair.real, pair.imag
    close(found, expected)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_gates_open_as_their_activation_says(activation: Activation, gate_first: bool) -> None:
    both = rand(2, 6)

    def opened(x: float) -> float:
        if activation == "silu":
            return x / (1 + math.exp(-x))
        if activation == "gelu":
            return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    gate, up = (0, 3) if gate_first else (3, 0)
    expected = [[opened(row[gate + c]) * row[up + c] for c in range(3)] for row in both.tolist()]
    close(reference.gated(both, activation, gate_first=gate_first), expected)


def test_pages_give_back_what_was_written() -> None:
    lengths, size = [5, 0, 3], 2
    pages = torch.tensor([[4, 0, 2], [0, 0, 0], [1, 3, 0]], dtype=torch.int32)
    keys, values = rand(8, 1, 4), rand(8, 1, 4, seed=1)
    slots = [int(pages[b, i // size]) * size + i % size for b, n in enumerate(lengths) for i in range(n)]
    caches = torch.zeros(2, 5, size, 1, 4)
    reference.kv_write(keys, values, torch.tensor(slots), caches[0], caches[1])
    found = reference.kv_gather(caches[0], caches[1], pages, bounds(lengths), 8)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    before = caches.clone()
    reference.kv_write(keys[:2], values[:2], torch.tensor([-1, 10]), caches[0], caches[1])
    assert torch.equal(caches, before), "tokens without a place are left out"


def plainly(
    query: Tensor, key: Tensor, value: Tensor, sees: Callable[[int, int], bool], options: dict[str, Any]
) -> Tensor:
    """One sequence, its queries the last of its tokens: one query, one head, one key at a time, in float64."""
    past, group = len(key) - len(query), query.shape[1] // key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for i, head in product(range(len(query)), range(query.shape[1])):
        seen = [j for j in range(len(key)) if sees(past + i, j)]
        scores = [float(query[i, head].double() @ key[j, head // group].double()) * 0.3 for j in seen]
        if (cap := options.get("softcap")) is not None:
            scores = [cap * math.tanh(score / cap) for score in scores]
        if (bias := options.get("bias")) is not None:
            middle = bias.shape[1] // 2
            scores = [
                score + float(bias[head, middle + j - i]) for j, score in zip(seen, scores, strict=True)
            ]
        weights = [math.exp(score) for score in scores]
        total = sum(weights) + (math.exp(options["sinks"][head]) if "sinks" in options else 0)
        for j, weight in zip(seen, weights, strict=True):
            out[i, head] += weight / total * value[j, head // group].double()
    return out


KINDS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": 3},
    {"causal": True, "window": 2},
    {"softcap": 2.0},
    {"bias": rand(4, 15, seed=7)},
    {"sinks": rand(4, seed=8)},
]


@pytest.mark.parametrize("seen", [None, [2, 9, 1, 0, 8, 0]])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind) or "full")
def test_packed_attention_stays_within_its_sequence_and_what_is_seen_of_it(
    kind: dict[str, Any], seen: list[int] | None
) -> None:
    lengths = [4, 4, 1, 0, 8, 5]
    tokens = sum(lengths)
    query, key, value = (rand(tokens, n, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    of_device = None if seen is None else torch.tensor(seen, dtype=torch.int32)
    found = reference.packed_attention(
        query, key, value, bounds(lengths), 8, scale=0.3, seen=of_device, **kind
    )
    parts = []
    for b, (q, k, v) in enumerate(zip(*(torch.split(x, lengths) for x in (query, key, value)), strict=True)):

        def sees(i: int, j: int, most: int = len(q) if seen is None else seen[b]) -> bool:
            return (
                j < most and (j <= i or not kind.get("causal")) and abs(i - j) < kind.get("window", math.inf)
            )

        parts.append(plainly(q, k, v, sees, kind))
    close(found, torch.cat(parts))


@pytest.mark.parametrize("kind", [{}, {"window": 3}, {"softcap": 2.0}, {"sinks": rand(4, seed=8)}])
def test_paged_attention_looks_back_over_all_pages(kind: dict[str, Any]) -> None:
    lengths, have, size = [3, 0, 1, 4], [7, 2, 9, 4], 4
    pages = torch.tensor([[5, 2, -1], [0, -1, -1], [1, 7, 3], [6, -1, -1]], dtype=torch.int32)
    caches = rand(8, size, 2, 4, seed=1), rand(8, size, 2, 4, seed=2)
    query = rand(sum(lengths), 4, 4)
    found = reference.paged_attention(
        query, *caches, pages, bounds(lengths), torch.tensor(have, dtype=torch.int32), 4, scale=0.3, **kind
    )
    parts = []
    for q, length, own in zip(torch.split(query, lengths), have, pages.tolist(), strict=True):
        key, value = (
            torch.stack([cache[own[t // size], t % size] for t in range(length)]) for cache in caches
        )
        parts.append(plainly(q, key, value, lambda i, j: 0 <= i - j < kind.get("window", 99), kind))
    close(found, torch.cat(parts))
