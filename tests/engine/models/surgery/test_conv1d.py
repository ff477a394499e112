"""Conv1D, turned round."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from carpool.engine.models.surgery.conv1d import as_linear


def test_it_is_a_linear_layer_with_its_weight_turned_round() -> None:
    conv = Conv1D(24, 16)
    tiny.inflate(conv)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    linear = as_linear(conv)
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, conv.weight.T)
    torch.testing.assert_close(linear(x), conv(x), rtol=1e-5, atol=1e-5)


def test_nothing_else_is_one() -> None:
    class Doubled(Conv1D):  # type: ignore[misc]
        pass

    assert as_linear(nn.Linear(16, 16)) is None
    assert as_linear(Doubled(24, 16)) is None
