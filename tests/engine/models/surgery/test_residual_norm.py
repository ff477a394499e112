"""Residual and norm behind a dense layer: one kernel where a block ends so, and no other block taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput

import tiny
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.engine.models.surgery.residual_norm import ResidualNorm, residual_norm
from emu.backend import Emulated

CONFIG = BertConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
GENERATOR = torch.Generator().manual_seed(1)
RESIDUAL = torch.randn(1, 7, 16, generator=GENERATOR)


class Ends(nn.Module):
    """As BERT's blocks end; what others do otherwise is in subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(16, 16), nn.LayerNorm(16, eps=1e-3)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dense(x) + residual)
        return out


class NormFirst(Ends):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dense(x)) + residual
        return out


class Halved(Ends):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dense(x) + 0.5 * residual)
        return out


class NoBias(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, bias=False)


class TwoNorms(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.LayerNorm(16)


class Own(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))


class Centred(nn.LayerNorm):
    """A norm of another make, and so a layer like any other."""


class Subclassed(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Centred(16)


def fused(
    module: nn.Module, dtype: torch.dtype, columns: int = 16
) -> tuple[ResidualNorm | None, Tensor, Tensor]:
    """What the module became, what it says, and what is said in its place."""
    tiny.inflate(module)
    module.eval().requires_grad_(False).to(dtype)
    x = torch.randn(1, 7, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    rehearsal = Rehearsal.of(module, lambda: module(x, RESIDUAL.to(dtype)))
    found = residual_norm("", module, rehearsal)
    expected = module(x, RESIDUAL.to(dtype))
    return found, expected, expected if found is None else found(x, RESIDUAL.to(dtype))


@pytest.mark.parametrize(
    ("make", "columns"), [(lambda: BertSelfOutput(CONFIG), 16), (lambda: BertOutput(CONFIG), 24), (Ends, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_kernel_adds_and_normalises(
    make: Callable[[], nn.Module], columns: int, dtype: torch.dtype, emulated: Emulated
) -> None:
    found, expected, ours = fused(make(), dtype, columns)
    assert found is not None
    assert emulated.ran == {"norm_rows"}
    assert (ours.shape, ours.dtype) == (expected.shape, dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_kept_in_32_bits_without_a_copy_where_they_are(
    dtype: torch.dtype, emulated: Emulated
) -> None:
    module = Ends()
    found, *_ = fused(module, dtype)
    assert found is not None
    assert found.weight.dtype == found.bias.dtype == torch.float32
    assert (found.weight.data_ptr() == module.norm.weight.data_ptr()) == (dtype == torch.float32)


@pytest.mark.parametrize("make", [NormFirst, Halved, NoBias, TwoNorms, Own, Subclassed])
def test_what_ends_otherwise_is_left(make: Callable[[], nn.Module], emulated: Emulated) -> None:
    assert fused(make(), torch.float32)[0] is None


def test_what_takes_one_tensor_is_left(emulated: Emulated) -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).requires_grad_(False)
    assert residual_norm("", module, Rehearsal.of(module, lambda: module(RESIDUAL))) is None


def test_what_was_never_called_is_left(emulated: Emulated) -> None:
    assert residual_norm("", Ends(), Rehearsal(scene=lambda: torch.no_grad())) is None
