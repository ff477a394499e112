"""Vectors are cut, normalised and cast row by row."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carpool.kernels import reference
from carpool.kernels.reference import Output, cut_and_normalize
from near import rand


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
