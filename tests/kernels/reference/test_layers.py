"""Norms, rotary positions and gates against torch's own and plain arithmetic."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from carpool.kernels import reference
from carpool.kernels.reference import Activation
from near import close, rand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_torchs_own(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (
        rand(4, 8).to(dtype),
        rand(4, 8, seed=1).to(dtype),
        rand(8, seed=2),
        rand(8, seed=3),
    )
    room = 1e-5 if dtype == torch.float32 else 2e-2
    layer, total = reference.norm_rows(x, residual, weight, bias, 1e-5, centred=True)
    assert total is not None
    assert torch.equal(total, x + residual)
    wide = (x + residual).double()
    close(layer, torch.nn.functional.layer_norm(wide, (8,), weight.double(), bias.double(), 1e-5), room)
    rms, total = reference.norm_rows(x, None, weight, None, 1e-5, centred=False)
    assert total is x
    assert reference.norm_rows(x, residual, weight, bias, 1e-5, centred=True, keep_sum=False)[1] is None
    close(rms, torch.nn.functional.rms_norm(x.double(), (8,), weight.double(), 1e-5), room)


@pytest.mark.parametrize("turned", [4, 6])
def test_rotary_turns_each_pair_by_its_angle(turned: int) -> None:
    x, angles = rand(3, 2, 6), rand(3, turned // 2, seed=1)
    full = torch.cat([angles, angles], 1)
    found = reference.rotary(x, full.cos(), full.sin())
    expected = x.double().clone()
    for t in range(3):
        for c in range(turned // 2):
            left, right, angle = x[t, :, c], x[t, :, c + turned // 2], angles[t, c]
            pair = torch.complex(left, right) * torch.polar(torch.ones(()), angle)
            expected[t, :, c], expected[t, :, c + turned // 2] = pair.real, pair.imag
    close(found, expected)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_gates_open_as_their_activation_says(activation: Activation, gate_first: bool) -> None:
    both = rand(2, 6)

    def opened(x: float) -> float:
        if activation == "silu":
            return x / (1 + math.exp(-x))
        if activation == "gelu":
            return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    gate, up = (0, 3) if gate_first else (3, 0)
    expected = [[opened(row[gate + c]) * row[up + c] for c in range(3)] for row in both.tolist()]
    close(reference.gated(both, activation, gate_first=gate_first), expected)
