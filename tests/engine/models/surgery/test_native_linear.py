"""Native linear layers: as near to float32 as torch's, taken where they fit, shared and not held twice."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import tiny
from carpool.engine.models.surgery.activation import ACTIVATIONS, Gelu
from carpool.engine.models.surgery.leaves import replace_linears
from carpool.engine.models.surgery.linear_gelu import LinearGelu
from carpool.engine.models.surgery.native_linear import NativeLinear, fits
from carpool.engine.models.surgery.native_linear import native as laid_out
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.engine.models.surgery.residual_norm import residual_norm
from carpool.kernels import native
from carpool.kernels import native_linear as kernels
from emu.backend import Emulated

pytestmark = pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
DTYPES = [torch.float32, torch.bfloat16]
M = TypeVar("M", bound=nn.Module)
X = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1)).bfloat16()


def seeded(module: M, dtype: torch.dtype = torch.bfloat16) -> M:
    tiny.inflate(module)
    return module.eval().requires_grad_(False).to(dtype)


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.to(exact) - exact).norm() / exact.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("outputs", [16, 112, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_as_exact_as_the_linear_and_what_follows_it(
    gelu: Gelu | None, bias: bool, outputs: int, dtype: torch.dtype
) -> None:
    linear, x = seeded(nn.Linear(48, outputs, bias=bias), dtype), X.to(dtype)
    plain = linear if gelu is None else LinearGelu(linear, gelu)
    out, before = NativeLinear(linear, gelu)(x), plain(x)
    exact = linear.double()(x.double())
    exact = exact if gelu is None else ACTIVATIONS[gelu](exact)
    assert (out.shape, out.dtype) == (before.shape, before.dtype)
    assert error(out, exact) <= 1.05 * error(before, exact) + 2e-7


def test_a_tokens_result_is_its_own() -> None:
    """To the bit, wherever it stands and whatever stands beside it."""
    layer = NativeLinear(seeded(nn.Linear(48, 80)))
    rows = torch.randn(400, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    together = layer(rows)
    for place in (0, 5, 6, 201, 399):
        assert torch.equal(layer(rows[place : place + 1])[0], together[place])
    assert torch.equal(layer(rows.flip(0)).flip(0), together)


def test_no_rows_make_no_rows() -> None:
    """An expert that no token goes to."""
    assert NativeLinear(seeded(nn.Linear(48, 80)))(X.view(-1, 48)[:0]).shape == (0, 80)


def test_rows_of_another_dtype_or_width_are_refused() -> None:
    layer = NativeLinear(seeded(nn.Linear(48, 80)))
    for wrong in (X.float(), X[..., :40]):
        with pytest.raises((ValueError, RuntimeError)):
            layer(wrong)


class Twice(nn.Linear):
    """A subclass: it computes something more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.Linear(48, 80), torch.float16),
        (nn.Linear(48, 24), torch.float32),
        (nn.Linear(2064, 16), torch.float32),
        (nn.Linear(48, 24), torch.bfloat16),
        (nn.Linear(47, 80), torch.bfloat16),
        (Twice(48, 80), torch.bfloat16),
        (nn.LayerNorm(48), torch.bfloat16),
    ],
)
def test_what_does_not_fit_is_left(layer: nn.Module, dtype: torch.dtype) -> None:
    assert fits(seeded(nn.Linear(48, 80)))
    assert not fits(seeded(layer, dtype))


def test_it_is_not_for_a_cpu_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level", 2)
    assert laid_out("", seeded(nn.Linear(48, 80)), None) is None
    assert laid_out("", seeded(nn.Linear(48, 80), torch.float32), None) is not None


def test_it_is_not_for_a_device_with_kernels_of_its_own(emulated: Emulated) -> None:
    assert laid_out("", seeded(nn.Linear(48, 80)), None) is None


def test_a_wrong_twin_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 48)))
    before, expected = list(module.children()), module(X)
    honest = NativeLinear.forward
    monkeypatch.setattr(NativeLinear, "forward", lambda self, x: honest(self, x) * 1.1)
    assert replace_linears(module, Rehearsal.of(module, lambda: module(X)), laid_out) == (0, 0)
    assert list(module.children()) == before
    assert torch.equal(module(X), expected)


def test_panels_take_the_place_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(nn.Sequential(nn.Linear(48, 128), nn.Linear(128, 64)))
    before = [weakref.ref(weight) for weight in module.parameters()]
    size = sum(weight.numel() for weight in module.parameters())
    assert replace_linears(module, Rehearsal.of(module, lambda: module(X)), laid_out) == (2, 0)
    gc.collect()
    assert not any(ref() is not None for ref in before)
    assert sum(weight.numel() for weight in module.parameters()) == size


def test_a_copy_for_another_thread_shares_them_and_follows_when_they_move() -> None:
    layer = NativeLinear(seeded(nn.Linear(48, 80)))
    shared = copy.deepcopy(layer, {id(weight): weight for weight in layer.parameters()})
    assert [id(weight) for weight in shared.parameters()] == [id(weight) for weight in layer.parameters()]
    expected = layer(X)
    for weight in layer.parameters():
        old, weight.data = weight.data, weight.data.clone()
        old.zero_()
    assert torch.equal(shared(X), expected)


# ── with the residual and the norm behind it ─────────────────────────────────────────────────────────────────


class Ends(nn.Module):
    """As BERT's blocks end."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(48, 80), nn.LayerNorm(80, eps=1e-3)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dense(x) + residual)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.end: nn.Module = Ends()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.end(x, residual)
        return out


RESIDUAL = torch.randn(3, 7, 80, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_blocks_end_is_one_call_and_as_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, residual = seeded(Block(), dtype), X.to(dtype), RESIDUAL.to(dtype)
    exact, before = copy.deepcopy(block).double()(x.double(), residual.double()), block(x, residual)
    rehearsal = Rehearsal.of(block, lambda: block(x, residual))
    fused = residual_norm("end", block.end, rehearsal)
    assert fused is not None
    block.end = fused
    assert replace_linears(block, rehearsal, laid_out) == (1, 0)
    calls: list[str] = []
    for name in ("linear", "linear_norm"):
        honest = getattr(kernels, name)

        def noted(*args: Any, name: str = name, honest: Any = honest, **kwargs: Any) -> Tensor:
            calls.append(name)
            out: Tensor = honest(*args, **kwargs)
            return out

        monkeypatch.setattr(kernels, name, noted)
    out = block(x, residual)
    assert calls == ["linear_norm"]
    assert (out.shape, out.dtype) == (before.shape, before.dtype)
    assert error(out, exact) <= 1.05 * error(before, exact) + 2e-7


def test_a_blocks_end_that_would_not_be_native_is_left() -> None:
    block = seeded(Block(), torch.float16)
    rehearsal = Rehearsal.of(block, lambda: block(X.half(), RESIDUAL.half()))
    assert residual_norm("end", block.end, rehearsal) is None
