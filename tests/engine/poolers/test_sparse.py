"""Lexical weights: of each token of a text the largest, and none for tokens that say nothing."""

from __future__ import annotations

import math

import torch
from torch import nn

from asking import ask
from carpool.engine.params import PoolingParams
from carpool.engine.poolers.sparse import LexicalPool
from carpool.engine.sequence import Sequence


def weigh(*texts: list[tuple[int, float]]) -> list[list[list[float]]]:
    """Of (token, weight) pairs; the hidden state is the weight itself. 0, 1 and 2 say nothing."""
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    hidden = torch.tensor([[weight] for text in texts for _, weight in text])
    sequences = [
        Sequence(0, i, [token for token, _ in text], PoolingParams()) for i, text in enumerate(texts)
    ]
    pool = LexicalPool(head.requires_grad_(False), frozenset({0, 1, 2}))
    rows = ask(pool, hidden, list(map(len, texts)), range(len(texts)), sequences)
    assert all(row.dtype == "float32" and row.shape[1] == 2 for row in rows)
    return [row.tolist() for row in rows]


def test_the_largest_weight_of_each_token_counts() -> None:
    text = [(0, 9.0), (7, 0.5), (5, 0.25), (7, 2.0), (7, 1.0), (2, 9.0)]
    assert weigh(text) == [[[5, 0.25], [7, 2.0]]]


def test_what_weighs_nothing_is_left_out() -> None:
    assert weigh([(5, -1.0), (6, 0.0), (7, 0.5)], [(0, 1.0), (1, 1.0)], [(9, 1.0)]) == [
        [[7, 0.5]],
        [],
        [[9, 1.0]],
    ]


def test_token_ids_of_the_largest_vocabularies_are_exact() -> None:
    assert weigh([(250_001, 1.0), (250_000, 1.0)]) == [[[250_000, 1.0], [250_001, 1.0]]]


def test_a_weight_that_is_no_number_stays_in_its_own_text() -> None:
    """So that this text fails, and those beside it do not."""
    broken, whole = weigh([(5, 1.0), (7, 2.0), (7, math.nan), (7, 3.0)], [(7, 1.0)])
    assert [entry for entry, _ in broken] == [5, 7]
    assert math.isnan(broken[1][1])
    assert whole == [[7, 1.0]]
