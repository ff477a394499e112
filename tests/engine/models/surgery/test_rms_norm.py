"""RMSNorm: both kinds are recognised by what they say, and norms of another make are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.engine.models.surgery.rms_norm import RMSNorm, fused_norm
from carpool.kernels import native, native_rows
from emu.backend import Emulated

X = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1)) * 3
STOCK: list[Callable[[], nn.Module]] = [
    lambda: LlamaRMSNorm(16, eps=1e-5),
    lambda: Gemma2RMSNorm(16, eps=1e-6),
    lambda: Olmo2RMSNorm(16, eps=1e-6),
    lambda: T5LayerNorm(16, eps=1e-6),
    lambda: nn.RMSNorm(16, eps=1e-2),
]


def seeded(norm: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(2)
    for weight in norm.parameters():
        weight.data = 1 + torch.randn(weight.shape, generator=generator)
    return norm.requires_grad_(False)


def fused(norm: nn.Module, *given: Tensor) -> RMSNorm | None:
    """As surgery asks, where `given` was what the norm got in the rehearsal."""
    rehearsal = Rehearsal.of(norm, lambda: [norm(x) for x in given])
    return fused_norm("", norm, rehearsal)


@pytest.mark.parametrize("make", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("natively", [True, False])
def test_it_says_what_the_original_says(
    make: Callable[[], nn.Module], dtype: torch.dtype, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not natively:
        monkeypatch.setattr(native, "library", None)
    norm = seeded(make()).to(dtype)
    twin = fused(norm)
    assert twin is not None
    x = X.to(dtype)
    ours, theirs = twin(x), norm(x)
    assert ours.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    assert (ours.float() - theirs.float()).abs().max() <= bound * theirs.float().abs().max()
    assert x.equal(X.to(dtype)), "the input was written to"


@pytest.mark.parametrize("make", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_device_torchs_kernel_serves_unless_the_weight_is_wider(
    make: Callable[[], nn.Module], dtype: torch.dtype, emulated: Emulated
) -> None:
    norm = seeded(make()).to(dtype)
    twin = fused(norm)
    assert twin is not None
    emulated.ran.clear()
    ours, theirs = twin(X.to(dtype)), norm(X.to(dtype))
    assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    assert (ours.float() - theirs.float()).abs().max() <= bound * theirs.float().abs().max()
    wider = twin.weight.dtype != dtype
    assert wider == (isinstance(norm, Gemma2RMSNorm) and dtype != torch.float32)
    assert emulated.ran == ({"norm_rows"} if wider else set())


@pytest.mark.skipif(native.library is None, reason="the native kernels were not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_a_kernel_serves(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads too, which are parts of wider rows."""
    norm = seeded(LlamaRMSNorm(16)).to(dtype)
    twin = fused(norm)
    assert twin is not None
    asked: list[tuple[int, ...]] = []
    honest = native_rows.norm_rows

    def noted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(tuple(x.shape))
        return honest(x, *args, **kwargs)

    monkeypatch.setattr(native_rows, "norm_rows", noted)
    heads = X.to(dtype).view(2, 3, 5 * 16)[..., 16:64].view(2, 3, 3, 16)
    torch.testing.assert_close(
        twin(heads), norm(heads), rtol=2e-2, atol=1e-6 if dtype == torch.float32 else 2e-2
    )
    assert asked == [(18, 16)]


def test_its_weights_are_the_originals() -> None:
    norm = seeded(LlamaRMSNorm(16))
    twin = fused(norm)
    assert twin is not None
    assert twin.weight.data_ptr() == norm.weight.data_ptr()


class Centred(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))
        return out


class EpsOutside(LlamaRMSNorm):  # type: ignore[misc]
    """Adds eps to the root and not below it: that shows in small rows only."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        root = hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
        out: Tensor = self.weight * hidden_states / (root + self.variance_epsilon)
        return out


class InGroups(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor) -> Tensor:
        grouped = hidden_states.view(*hidden_states.shape[:-1], 2, -1)
        root = (grouped.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        out: Tensor = self.weight * (grouped / root).flatten(-2)
        return out


@pytest.mark.parametrize(
    "norm", [Centred(16), EpsOutside(16), InGroups(16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Identity()]
)
def test_what_is_another_norm_is_left(norm: nn.Module) -> None:
    assert fused(seeded(norm)) is None


def test_one_that_answers_in_another_dtype_than_it_is_given_is_left() -> None:
    """T5's, behind a feed-forward that is kept in float32."""
    norm = seeded(T5LayerNorm(16)).half()
    assert fused(norm, X) is None
    assert fused(norm, X.half()) is not None
