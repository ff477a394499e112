"""Packed linear layers equal the plain ones; what does not stays plain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from carpool.engine.models.surgery.activation import APPROXIMATION, Gelu
from carpool.engine.models.surgery.leaves import replace_linears
from carpool.engine.models.surgery.linear_gelu import LinearGelu
from carpool.engine.models.surgery.packed_linear import PackedLinear, packed
from carpool.engine.models.surgery.rehearsal import Rehearsal

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="no oneDNN in this torch",
)
X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))


def seeded(module: nn.Module) -> nn.Module:
    tiny.inflate(module)
    return module.eval().requires_grad_(False)


def pack(module: nn.Module) -> tuple[int, int]:
    return replace_linears(module, Rehearsal.of(module, lambda: module(X)), packed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_linear_and_what_follows_it(gelu: Gelu | None, bias: bool, dtype: torch.dtype) -> None:
    linear = seeded(nn.Linear(16, 24, bias=bias)).to(dtype)
    assert isinstance(linear, nn.Linear)
    x = X.to(dtype)
    expected = linear(x).float()
    if gelu:
        expected = F.gelu(expected, approximate=APPROXIMATION[gelu])
    out = PackedLinear(linear, gelu)(x)
    assert out.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    assert (out.float() - expected).abs().max() <= bound * expected.abs().max()


def test_layers_are_packed_alone_and_with_their_gelu() -> None:
    first = nn.Linear(16, 24)
    module = seeded(nn.Sequential(LinearGelu(first, "gelu"), nn.Linear(24, 16)))
    expected = module(X)
    assert pack(module) == (1, 1)
    assert [type(child) for child in module.children()] == [PackedLinear, PackedLinear]
    torch.testing.assert_close(module(X), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_twin_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)))
    before, expected = list(module.children()), module(X)
    honest = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: honest(self, x) * 1.001)
    assert pack(module) == (0, 0)
    assert list(module.children()) == before
    assert torch.equal(module(X), expected)


def test_a_twin_that_raises_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: PackedLinear, x: Tensor) -> Tensor:
        raise RuntimeError("not on this CPU")

    module = seeded(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)))
    before = list(module.children())
    monkeypatch.setattr(PackedLinear, "forward", no)
    assert pack(module) == (0, 0)
    assert list(module.children()) == before
