"""The native kernels compute what their torch twins do, on every instruction set that this CPU has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import native, ops, reference

needs_native = pytest.mark.skipif(native.library is None, reason="the native kernels are not built")
LEVELS = range(1, native.level + 1)


def make(
    lengths: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as views of one fused row, as models hand them over."""
    generator = torch.Generator().manual_seed(sum(lengths) + size)
    row = torch.randn(sum(lengths), heads + 2 * kv_heads, size, generator=generator).to(dtype)
    query, key, value = row.split([heads, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]
    return 2 * query, key, value


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@given(
    lengths=st.lists(
        st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 100, 257])), min_size=1, max_size=5
    ),
    heads=st.sampled_from([(1, 1), (12, 12), (4, 2), (6, 1)]),
    size=st.sampled_from([16, 32, 48, 64, 80, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 70)),
    softcap=st.sampled_from([None, 5.0]),
)
@settings(max_examples=60, deadline=None)
def test_attention_equals_its_twin(
    level: int,
    lengths: list[int],
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> None:
    query, key, value = make(lengths, *heads, size, dtype)
    runs = [(length, 1) for length in lengths]
    assert native.serves(query, key, value)
    how = {"scale": size**-0.5, "causal": causal, "window": window, "softcap": softcap}
    exact = reference.varlen_attention(query.float(), key.float(), value.float(), runs, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", level)
        mine = native.varlen_attention(query, key, value, runs, **how)

    assert mine.dtype == dtype
    # bfloat16 keeps 8 bits: of each weight, and of the result.
    bound = 1e-5 if dtype == torch.float32 else 2 * 2**-8
    assert (mine.float() - exact).abs().max() <= bound * exact.abs().max()


@needs_native
def test_what_it_cannot_take_goes_to_the_twin() -> None:
    query, key, value = make([5, 9], 2, 2, 24, torch.float32)

    assert not native.serves(query, key, value)
    out = ops.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0)
    assert torch.equal(out, reference.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0))


@needs_native
@pytest.mark.parametrize("asks", [{"bias": torch.ones(2, 27) * torch.arange(27)}, {"sinks": torch.ones(2)}])
def test_what_it_knows_nothing_of_goes_to_the_twin(asks: dict[str, Any]) -> None:
    query, key, value = make([5, 9], 2, 2, 32, torch.float32)

    assert native.serves(query, key, value)
    out = ops.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0, **asks)
    assert torch.equal(
        out, reference.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0, **asks)
    )
    assert not torch.allclose(out, native.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0))


@needs_native
def test_extreme_scores_stay_finite() -> None:
    query, key, value = make([33], 2, 2, 32, torch.float32)

    out = native.varlen_attention(1e4 * query, 1e4 * key, value, [(33, 1)], scale=1.0)
    assert torch.isfinite(out).all()


def test_without_the_library_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", None)
    query, key, value = make([3], 1, 1, 16, torch.float32)

    assert not native.serves(query, key, value)
    assert ops.attention_in_use() == "torch"
    assert ops.varlen_attention(query, key, value, [(3, 1)], scale=1.0).shape == (3, 1, 16)
