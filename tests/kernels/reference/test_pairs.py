"""Scores of pairs against plain loops."""

from __future__ import annotations

import math

import torch

from carpool.kernels import reference
from emu.choose import bounds
from near import close, rand


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
