"""Logits are activated and weighed as plain loops do it."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool.kernels import reference
from carpool.kernels.reference import IDENTITY, SIGMOID, SOFTMAX
from emu.choose import bounds
from near import close, rand

texts = st.lists(st.integers(0, 9), min_size=1, max_size=6)


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
