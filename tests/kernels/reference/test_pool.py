"""Pooling is what each sequence gives alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import reference
from carpool.kernels.reference import CLS, LAST, MEAN
from emu.choose import bounds
from near import close, rand

Method = Callable[[Tensor, Tensor], Tensor]


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
