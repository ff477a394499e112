"""Gated feed-forward: recognised in each of its forms, and nothing else taken for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from carpool.engine.models.surgery.gated_mlp import GatedMLP, gated
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.kernels import native, native_rows
from emu.backend import Emulated

X = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
ACTS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


class Llama(nn.Module):
    def __init__(self, act: nn.Module, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias)
        self.down_proj = nn.Linear(24, 16, bias=bias)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class GateLast(nn.Module):
    """Both in one weight; the gate is the second half, its activation no module; there is a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.Wi, self.Wo, self.drop = nn.Linear(16, 48), nn.Linear(24, 16), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.Wi(x).chunk(2, -1)
        out: Tensor = self.Wo(self.drop(up * F.silu(gate)))
        return out


class Summed(Llama):
    """Looks the same, and adds where the others multiply."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        return out


class Scaled(Llama):
    """Has a weight of its own."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(act)
        self.scale = nn.Parameter(torch.ones(16))


class Wide(nn.Module):
    """Halves of 32: whole vectors, for a native kernel."""

    def __init__(self, act: nn.Module, *, gate_first: bool) -> None:
        super().__init__()
        self.Wi, self.Wo, self.act, self.gate_first = nn.Linear(16, 64), nn.Linear(32, 16), act, gate_first

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.Wi(x).chunk(2, -1)
        gate, up = (one, other) if self.gate_first else (other, one)
        out: Tensor = self.Wo(self.act(gate) * up)
        return out


def as_gated(module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[GatedMLP | None, Tensor]:
    tiny.inflate(module)
    module.eval().requires_grad_(False).to(dtype)
    rehearsal = Rehearsal.of(module, lambda: module(X.to(dtype)))
    return gated("", module, rehearsal), module(X.to(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_become_one(act: str, bias: bool, dtype: torch.dtype) -> None:
    """In 16 bits as well the activation is the very one: it is asked in 32."""
    found, expected = as_gated(Llama(ACTS[act], bias=bias), dtype)
    assert found is not None
    assert (found.activation, found.gate_first) == (act, True)
    assert (found.both.in_features, found.both.out_features) == (16, 48)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found(X.to(dtype)), expected, rtol=bound, atol=bound)


def test_which_half_is_the_gate_is_found_out() -> None:
    module = GateLast()
    found, expected = as_gated(module)
    assert found is not None
    assert (found.activation, found.gate_first) == ("silu", False)
    assert found.both is module.Wi
    torch.testing.assert_close(found(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.library is None, reason="the native kernels were not built")
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_one_kernel_activates_and_multiplies(
    act: str, gate_first: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Wide(ACTS[act], gate_first=gate_first)
    found, expected = as_gated(module, dtype)
    assert found is not None
    assert found.gate_first == gate_first
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found(X.to(dtype)), expected, rtol=bound, atol=bound)
    monkeypatch.setattr(native_rows, "gated", lambda *_, **__: torch.zeros(7, 32, dtype=dtype))
    assert torch.equal(found(X.to(dtype)), module.Wo.bias.expand(1, 7, 16)), "it was not the kernel"


@pytest.mark.parametrize("make", [lambda: Llama(nn.GELU()), lambda: Llama(nn.SiLU()), GateLast])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_one_kernel_activates_and_multiplies(
    make: Callable[[], nn.Module], dtype: torch.dtype, emulated: Emulated
) -> None:
    found, expected = as_gated(make(), dtype)
    assert found is not None
    assert emulated.ran == {"gated"}
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found(X.to(dtype)), expected, rtol=bound, atol=bound)


def test_on_a_device_as_well_what_only_looks_like_one_is_left(emulated: Emulated) -> None:
    assert as_gated(Summed(nn.SiLU()))[0] is None
    assert emulated.ran == {"gated"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Summed(nn.SiLU()),
        lambda: Scaled(nn.SiLU()),
        lambda: Llama(nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)),
        lambda: nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)),
    ],
)
def test_what_is_no_gated_feed_forward_is_not_taken_for_one(make: Callable[[], nn.Module]) -> None:
    assert as_gated(make())[0] is None
