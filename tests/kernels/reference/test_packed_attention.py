"""Attention of sequences that only the device knows, and to pages, against a loop in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from carpool.kernels import reference
from emu.choose import bounds
from near import close, rand


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
