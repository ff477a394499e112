"""How torch's varlen_attn is called, against one made from its definition, and how it is tried before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flash
from carpool.kernels import reference, varlen

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    varlen.fault.cache_clear()
    yield
    varlen.fault.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, attend: Any) -> None:
    monkeypatch.setattr(varlen, "implementation", lambda: attend)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_twin(
    causal: bool, window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, flash.varlen_attn)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(13, heads, 32, generator=generator).bfloat16() for heads in (4, kv_heads, kv_heads)
    )
    cu_seqlens = torch.tensor([0, 1, 8, 13], dtype=torch.int32)
    how: dict[str, Any] = {"scale": 0.3, "causal": causal, "window": window}
    out = varlen.varlen_attention(query, key, value, cu_seqlens, 7, **how)
    told = reference.varlen_attention(query, key, value, [(1, 1), (7, 1), (5, 1)], **how)
    torch.testing.assert_close(out, told, rtol=1e-2, atol=1e-2)


def test_columns_with_gaps_are_closed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, flash.varlen_attn)
    query = torch.randn(3, 8, 2).bfloat16().transpose(1, 2)
    whole, bounds = query.contiguous(), torch.tensor([0, 3], dtype=torch.int32)
    out = varlen.varlen_attention(query, query, query, bounds, 3, scale=1.0)
    assert torch.equal(out, varlen.varlen_attention(whole, whole, whole, bounds, 3, scale=1.0))


def test_one_that_does_what_it_says_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, flash.varlen_attn)
    assert varlen.fault(CPU) is None


@pytest.mark.parametrize("off", [(-1, 0), (1, 0), (0, 1)])
def test_one_that_counts_windows_otherwise_is_not(
    off: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any, window_size: tuple[int, int], **how: Any) -> Tensor:
        left, right = (side if side < 0 else side + more for side, more in zip(window_size, off, strict=True))
        return flash.varlen_attn(*args, window_size=(left, right), **how)

    pretend(monkeypatch, other)
    assert varlen.fault(CPU) == "computes something else here than it is documented to"


def test_one_that_gives_no_numbers_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda query, *_, **__: torch.full_like(query, torch.nan))
    assert varlen.fault(CPU) == "computes something else here than it is documented to"


def test_one_that_is_not_built_in_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.\nmore of it")

    pretend(monkeypatch, absent)
    assert varlen.fault(CPU) == "fails here (USE_FLASH_ATTENTION was not enabled for build)"


def test_torchs_own_takes_what_it_is_handed() -> None:
    """Without a device to run it on: all arguments bind, and what is missing is CUDA."""
    assert varlen.fault(CPU) == (
        "fails here (Could not run 'aten::_flash_attention_forward' with arguments from the 'CPU' backend)"
    )
