import numpy as np
import pytest

from agreement import agreed_cosine


def test_length_does_not_matter_and_direction_does() -> None:
    vectors = np.eye(3, dtype=np.float32)
    assert agreed_cosine("x", "float32", 5 * vectors, vectors) == pytest.approx(1.0)
    with pytest.raises(SystemExit, match="x has other vectors"):
        agreed_cosine("x", "bfloat16", vectors[::-1], vectors)


def test_half_precision_may_differ_more() -> None:
    reference = np.array([[1.0, 0.0]], np.float32)
    near = np.array([[1.0, 0.02]], np.float32)  # cosine 0.9998
    assert agreed_cosine("x", "bfloat16", near, reference) < 0.9999
    with pytest.raises(SystemExit):
        agreed_cosine("x", "float32", near, reference)


def test_what_is_no_number_does_not_agree() -> None:
    with pytest.raises(SystemExit):
        agreed_cosine("x", "float32", np.full((1, 2), np.nan, np.float32), np.ones((1, 2), np.float32))
