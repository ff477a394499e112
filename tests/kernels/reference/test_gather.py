"""Rows are those that were asked for."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool.kernels import reference
from emu.choose import bounds
from near import rand

texts = st.lists(st.integers(0, 9), min_size=1, max_size=6)


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
