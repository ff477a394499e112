"""Surgery: each swap computes the same, and one that does not is undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.models import surgery
from carpool.engine.models.surgery import PackedLinear, operate
from carpool.engine.packing import pack_ids

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="no oneDNN in this torch",
)
X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))


def seeded(module: nn.Module) -> nn.Module:
    tiny.inflate(module)
    return module.eval().requires_grad_(False)


def feed_forward(*, gelu: nn.Module | None = None, bias: bool = True) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(16, 24, bias=bias), gelu or nn.GELU(), nn.Linear(24, 16, bias=bias))
    seeded(module)
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_equals_the_linear_and_what_follows_it(
    gelu: str | None, bias: bool, dtype: torch.dtype
) -> None:
    linear = seeded(nn.Linear(16, 24, bias=bias)).to(dtype)
    assert isinstance(linear, nn.Linear)
    x = X.to(dtype)
    expected = linear(x).float()
    if gelu:
        expected = F.gelu(expected, approximate=gelu)
    out = PackedLinear(linear, gelu)(x)
    assert out.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    assert (out.float() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("gelu", [nn.GELU(), nn.GELU(approximate="tanh")])
def test_linear_and_gelu_become_one_and_the_rest_is_packed(gelu: nn.Module) -> None:
    module = feed_forward(gelu=gelu)
    expected = module(X)
    assert operate(module) == {"linear_gelu": 1, "linear": 1}
    assert not any(type(child) is nn.Linear for child in module.modules())
    torch.testing.assert_close(module(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [nn.ReLU(), nn.SiLU(), nn.Tanh(), nn.Identity()])
def test_an_activation_that_is_no_gelu_stays(other: nn.Module) -> None:
    module = feed_forward(gelu=other)
    expected = module(X)
    assert operate(module) == {"linear_gelu": 0, "linear": 2}
    assert module[1] is other
    torch.testing.assert_close(module(X), expected, rtol=1e-5, atol=1e-5)


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
    seeded(module)
    expected = module(X)
    assert operate(module) == {"linear_gelu": 0, "linear": 1}
    assert isinstance(module.act, nn.GELU)
    torch.testing.assert_close(module(X), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_swap_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = feed_forward()
    before, expected = list(module), module(X)
    honest = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: honest(self, x) * 1.001)
    assert operate(module) == {"linear_gelu": 0, "linear": 0}
    assert list(module) == before
    assert torch.equal(module(X), expected)


def test_a_gelu_taken_for_its_approximation_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = feed_forward()
    gelu, expected = module[1], module(X)
    monkeypatch.setattr(surgery, "_gelu_variant", lambda m: "tanh" if isinstance(m, nn.GELU) else None)
    assert operate(module)["linear_gelu"] == 0
    assert module[1] is gelu
    torch.testing.assert_close(module(X), expected, rtol=1e-6, atol=1e-6)


def test_a_swap_that_raises_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: PackedLinear, x: Tensor) -> Tensor:
        raise RuntimeError("not on this CPU")

    module = feed_forward()
    before = list(module)
    monkeypatch.setattr(PackedLinear, "forward", no)
    assert operate(module) == {"linear_gelu": 0, "linear": 0}
    assert list(module) == before


def test_a_subclass_of_linear_computes_something_more_and_stays() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module = nn.Sequential(Doubled(16, 16))
    seeded(module)
    assert operate(module)["linear"] == 0
    assert type(module[0]) is Doubled


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_models_results_survive_surgery(family: str, checkpoint: Callable[[str], Path]) -> None:
    config = {"model": str(checkpoint(family)), "dtype": "float32", "cpu_workers": 1}
    whole = build(EngineConfig(**config, surgery=False))  # type: ignore[arg-type]
    patient = build(EngineConfig(**config))  # type: ignore[arg-type]
    assert whole.model.surgery == {}
    assert sum(patient.model.surgery.values()) > 0
    assert not any(isinstance(m, PackedLinear) for m in whole.runners[0]._backbone.module.modules())
    assert patient.model.parameters == whole.model.parameters
    batch = pack_ids([[5, 6, 7], [8], list(range(10, 40))], torch.device("cpu"))
    with torch.inference_mode():
        expected = whole.runners[0]._backbone.forward(batch)
        out = patient.runners[0]._backbone.forward(batch)
    assert (out - expected).norm() <= 1e-5 * expected.norm()
