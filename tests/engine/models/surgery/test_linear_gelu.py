"""A GELU is fused with the linear layer that it directly follows, and with no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

import tiny
from carpool.engine.models.surgery import linear_gelu
from carpool.engine.models.surgery.linear_gelu import LinearGelu, fuse_gelu
from carpool.engine.models.surgery.rehearsal import Rehearsal

X = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))


def fused(module: nn.Module) -> tuple[bool, Tensor]:
    tiny.inflate(module)
    module.eval().requires_grad_(False)
    expected = module(X)
    return fuse_gelu("", module, Rehearsal.of(module, lambda: module(X))), expected


@pytest.mark.parametrize(
    ("gelu", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (NewGELUActivation(), "gelu_tanh")],
)
def test_linear_and_gelu_become_one(gelu: nn.Module, name: str) -> None:
    module = nn.Sequential(nn.Linear(16, 24), gelu, nn.Linear(24, 16))
    done, expected = fused(module)
    assert done
    assert isinstance(module[0], LinearGelu)
    assert module[0].gelu == name
    assert isinstance(module[1], nn.Identity)
    torch.testing.assert_close(module(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [nn.ReLU(), nn.SiLU(), nn.Tanh(), nn.Identity()])
def test_an_activation_that_is_no_gelu_stays(other: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(16, 24), other, nn.Linear(24, 16))
    assert not fused(module)[0]
    assert module[1] is other


class GeluFirst(nn.Module):
    """The activation stands before the linear layer: fusing it behind would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(self.act(x))
        return out


class Gated(GeluFirst):
    """Something else reads the linear layer's output as well."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.dense(x)) * self.dense(x)
        return out


@pytest.mark.parametrize("kind", [GeluFirst, Gated])
def test_a_gelu_that_does_not_simply_follow_is_left_alone(kind: type[GeluFirst]) -> None:
    module = kind()
    before = list(module.children())
    done, expected = fused(module)
    assert not done
    assert list(module.children()) == before
    assert torch.equal(module(X), expected)


def test_a_gelu_taken_for_its_approximation_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    monkeypatch.setattr(
        linear_gelu, "which_activation", lambda m: "gelu_tanh" if isinstance(m, nn.GELU) else None
    )
    before = list(module)
    assert not fused(module)[0]
    assert list(module) == before
