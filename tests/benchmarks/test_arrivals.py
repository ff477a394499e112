from itertools import pairwise
from statistics import mean, pstdev

import pytest

from arrivals import poisson


def test_arrivals_are_independent_and_as_many_as_asked() -> None:
    due = poisson(100.0, 100.0)
    assert len(due) == pytest.approx(10_000, rel=0.05)
    assert due == sorted(due)
    assert due[0] > 0
    assert due[-1] < 100
    gaps = [after - before for before, after in pairwise(due)]
    # Of an exponential distribution both are the same; fixed gaps would have no deviation.
    assert pstdev(gaps) == pytest.approx(mean(gaps), rel=0.05)


def test_a_seed_gives_the_same_again_and_another_others() -> None:
    assert poisson(5.0, 10.0, 1) == poisson(5.0, 10.0, 1)
    assert poisson(5.0, 10.0, 1) != poisson(5.0, 10.0, 2)
