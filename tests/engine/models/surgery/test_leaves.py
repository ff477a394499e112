"""Leaves: every linear layer is replaced, but for those that somebody multiplies by past the layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from carpool.engine.models.surgery.activation import Gelu
from carpool.engine.models.surgery.leaves import replace_linears
from carpool.engine.models.surgery.rehearsal import Rehearsal

X = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))


class Twin(nn.Module):
    """Says the same, and has no weight of that name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = (linear,)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner[0](x)
        return out


class Mamba(nn.Module):
    """Multiplies by a layer's weight itself, as Mamba's mixers do; the other layer it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.linear(x, self.step.weight, self.step.bias))
        return out


class Experts(nn.Module):
    """Nobody goes to the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.heads[1](self.experts[0](x))
        return out


def make(path: str, linear: nn.Linear, gelu: Gelu | None) -> nn.Module | None:
    return None if path.endswith("not_this") else Twin(linear)


def replaced(module: nn.Module) -> tuple[int, int]:
    tiny.inflate(module)
    rehearsal = Rehearsal.of(module, lambda: module(X))
    expected = module(X)
    counts = replace_linears(module, rehearsal, make)
    torch.testing.assert_close(module(X), expected)
    return counts


def test_a_module_that_reaches_past_its_layers_keeps_them() -> None:
    module = Mamba()
    before = list(module.children())
    assert replaced(module) == (0, 0)
    assert list(module.children()) == before


def test_what_the_rehearsal_did_not_reach_is_replaced_as_well() -> None:
    module = Experts()
    assert replaced(module) == (4, 0)
    assert not any(isinstance(child, nn.Linear) for child in module.modules())


def test_what_is_not_made_is_left() -> None:
    module = nn.Sequential()
    module.add_module("this", nn.Linear(16, 16))
    module.add_module("not_this", nn.Linear(16, 16))
    assert replaced(module) == (1, 0)
    assert type(module.not_this) is nn.Linear
