"""GPT-2's Conv1D: a linear layer whose weight is stored [in, out]. Turned round, it is one like all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from carpool.engine.models.surgery.agreement import agree


def as_linear(module: nn.Module) -> nn.Linear | None:
    """The same as an nn.Linear, if it is a Conv1D and that says the same."""
    if type(module) is not Conv1D:
        return None
    conv: Any = module
    linear = nn.Linear(conv.nx, conv.nf, device=torch.device("meta"))
    linear.weight = nn.Parameter(conv.weight.t().contiguous(), requires_grad=False)
    linear.bias = conv.bias
    x = torch.randn(1, 5, conv.nx, generator=torch.Generator().manual_seed(1)).to(conv.weight)
    return linear if agree(linear(x), module(x)) else None
