"""Whole numbers of an embedding, as its own module makes them."""

from __future__ import annotations

import torch

from carpool.engine.poolers.tanh_int8 import TanhInt8


def test_rounds_127_times_the_tanh() -> None:
    x = torch.tensor([[0.0, 0.01, -0.5, 1.0, 40.0, -40.0]])
    assert TanhInt8()(x).tolist() == [[0.0, 1.0, -59.0, 97.0, 127.0, -127.0]]
