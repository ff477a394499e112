"""The native row kernels compute what their torch twins do, on every instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import native, native_rows, ops, reference, twins_cpu
from carpool.kernels.reference import Activation, Output

pytestmark = pytest.mark.skipif(native.library is None, reason="the native kernels are not built")
# Rows know two levels: the third one's products are not theirs.
each_level = pytest.mark.parametrize("level", range(1, min(native.level, 2) + 1))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
widths = st.sampled_from([16, 48, 384, 1040])
activations = st.sampled_from(["silu", "gelu", "gelu_tanh"])
few = settings(max_examples=15, deadline=None)


@contextmanager
def running_at(level: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", level)
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def assert_near(mine: Tensor, twin: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    """No farther from the exact result than rounding once explains; the twin is told the tensors in float64."""
    exact = twin(
        *(None if x is None else x.double() if x.is_floating_point() else x for x in tensors)
    ).double()
    assert mine.shape == exact.shape
    # Half a place of bfloat16 is 2^-9 of a number; float32's sums lose a few places of 2^-24.
    relative, absolute = (2**-8, 1e-5) if mine.dtype == torch.bfloat16 else (2e-6, 4e-6)
    assert ((mine.double() - exact).abs() <= relative * exact.abs() + absolute * exact.abs().max()).all()


@each_level
@given(
    rows=st.integers(1, 9),
    width=widths,
    dtype=dtypes,
    residual=st.booleans(),
    bias=st.booleans(),
    centred=st.booleans(),
)
@few
def test_norm_equals_its_twin(
    level: int, rows: int, width: int, dtype: torch.dtype, residual: bool, bias: bool, centred: bool
) -> None:
    x = randn(rows, width, dtype=dtype) + 1
    other = randn(rows, width, dtype=dtype, scale=9.0).flip(0) if residual else None
    weight, shift = randn(width), randn(width).flip(0) if bias else None
    with running_at(level):
        mine, total = native_rows.norm_rows(x, other, weight, shift, 1e-6, centred=centred)
    theirs, their_total = reference.norm_rows(x, other, weight, shift, 1e-6, centred=centred)

    assert total is not None
    assert their_total is not None
    assert torch.equal(total, their_total)
    with running_at(level):
        alone, none = native_rows.norm_rows(x, other, weight, shift, 1e-6, centred=centred, keep_sum=False)
    assert none is None
    assert torch.equal(alone, mine)
    # Of the same rounded sum: what differs is the norm alone.
    wide = their_total.double()
    wide = wide - wide.mean(1, keepdim=True) if centred else wide
    exact = wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight
    assert_near(mine, lambda: exact + (0 if shift is None else shift))
    assert mine.dtype == theirs.dtype == dtype


@each_level
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates_hold_where_numbers_are_large_or_none(level: int, activation: Activation) -> None:
    none = float("inf"), float("-inf"), float("nan")
    x = torch.tensor([30.0, 1e4, 3e38, 0.0, -0.0, -30.0, -1e4, -3e38, *none, *[1.0] * 5])
    with running_at(level):
        mine = native_rows.gated(torch.cat((x, torch.ones(16)))[None], activation)[0]
    assert torch.equal(mine[:3], x[:3])
    assert (mine[3:8].abs() < 1e-11).all()
    assert not torch.isfinite(mine[[8, 10]]).any()


@each_level
@given(
    tokens=st.integers(0, 9),
    width=widths,
    dtype=dtypes,
    heights=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    absent=st.booleans(),
    bias=st.booleans(),
    centred=st.booleans(),
)
@few
def test_embeddings_equal_their_twin(
    level: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    heights: list[int],
    absent: bool,
    bias: bool,
    centred: bool,
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    tables = [randn(height + 9, width, dtype=dtype)[:height] for height in heights]
    ids: list[Tensor | None] = [torch.randint(len(t), (tokens,), generator=generator) for t in tables]
    if absent and len(ids) > 1:
        ids[-1] = None
    norm = twins_cpu.Norm(randn(width), randn(width).flip(0) if bias else None, 1e-6, centred)
    with running_at(level):
        mine = native_rows.embed_rows(tables, ids, norm)
    assert mine.shape == (tokens, width)
    assert mine.dtype == dtype
    assert_near(mine, lambda *wide: twins_cpu.embed_rows(wide, ids, norm), *tables) if tokens else None


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 40])
def test_a_row_that_is_not_there_is_refused(wrong: int) -> None:
    norm = twins_cpu.Norm(torch.ones(16), None, 1e-6, centred=True)
    with pytest.raises(IndexError, match="beyond its table"):
        native_rows.embed_rows([randn(5, 16)], [torch.tensor([0, wrong])], norm)


def test_a_table_of_no_rows_has_none_for_all_tokens() -> None:
    norm = twins_cpu.Norm(torch.ones(16), None, 1e-6, centred=True)
    with pytest.raises(IndexError, match="beyond its table"):
        native_rows.embed_rows([randn(5, 16), torch.empty(0, 16)], [torch.tensor([0]), None], norm)


@each_level
@given(rows=st.integers(1, 5), width=widths, dtype=dtypes, activation=activations, first=st.booleans())
@few
def test_gates_equal_their_twin(
    level: int, rows: int, width: int, dtype: torch.dtype, activation: Activation, first: bool
) -> None:
    both = randn(rows, 2 * width + 16, dtype=dtype)[:, : 2 * width]  # rows of a wider one
    with running_at(level):
        mine = native_rows.gated(both, activation, gate_first=first)

    def exact(wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, -1) if first else reversed(wide.chunk(2, -1))
        return _exact(gate, activation) * up

    assert_near(mine, exact, both)


@each_level
@given(
    tokens=st.integers(1, 7),
    heads=st.integers(1, 4),
    sizes=st.sampled_from([(32, 32), (64, 64), (96, 32), (80, 64), (128, 128)]),
    dtype=dtypes,
    angles=dtypes,
)
@few
def test_rotary_equals_its_twin(
    level: int, tokens: int, heads: int, sizes: tuple[int, int], dtype: torch.dtype, angles: torch.dtype
) -> None:
    size, turned = sizes
    x = randn(tokens, heads + 2, size, dtype=dtype)[:, 1 : heads + 1]  # heads of a wider row
    cos, sin = randn(tokens, turned, dtype=angles, scale=1.0), randn(tokens + 1, turned, dtype=angles)[1:]
    with running_at(level):
        mine = native_rows.rotary(x, cos, sin)
    theirs = reference.rotary(x, cos, sin)
    assert torch.equal(mine[..., turned:], theirs[..., turned:])
    assert_near(mine, lambda: reference.rotary(x.float(), cos, sin))


@each_level
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=widths,
    dtype=dtypes,
    output=st.sampled_from(["float32", "bfloat16", "int8", "binary"]),
    data=st.data(),
)
@few
def test_pooling_equals_its_twin(
    level: int,
    lengths: list[int],
    width: int,
    dtype: torch.dtype,
    output: Output,
    data: st.DataObject,
) -> None:
    count = len(lengths)

    def each(values: st.SearchStrategy[int], kind: torch.dtype) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count)), dtype=kind)

    modes, kept = each(st.integers(0, 2), torch.int8), each(st.integers(-width, 2 * width), torch.int32)
    normalize = each(st.integers(0, 1), torch.bool)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden = randn(sum(lengths), width, dtype=dtype)
    with running_at(level):
        mine, scales = native_rows.pool_rows(hidden, bounds, modes, kept, normalize, output)
    theirs, their_scales = reference.pool_rows(hidden, bounds, modes, kept, normalize, output)

    assert mine.dtype == theirs.dtype
    assert torch.allclose(scales, their_scales, rtol=1e-5)
    if output == "binary":  # a sum near nothing may fall on either side
        assert (mine != theirs).sum() <= 0.01 * mine.numel()
    else:
        near = {"float32": 1e-5, "bfloat16": 2**-7, "int8": 1.0}[output]
        assert torch.allclose(mine.float(), theirs.float(), rtol=near, atol=near)


def test_the_engine_pools_natively_what_is_served_and_by_the_twin_what_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.dtype] = []
    honest = native_rows.pool_rows

    def watched(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(hidden.dtype)
        return honest(hidden, *rest)

    monkeypatch.setattr(native_rows, "pool_rows", watched)
    plan = torch.tensor([0, 3, 5]), torch.tensor([2, 0]), torch.tensor([32, 8]), torch.tensor([True, False])
    spread = randn(5, 64)[:, ::2]
    for hidden in (randn(5, 32), randn(5, 32, dtype=torch.float16), spread, spread.contiguous()):
        mine, theirs = ops.pool_rows(hidden, *plan)[0], reference.pool_rows(hidden, *plan)[0]
        torch.testing.assert_close(mine, theirs)
    assert seen == [torch.float32, torch.float32]


def test_a_number_that_is_none_stays_one() -> None:
    hidden = randn(3, 32)
    hidden[1, 7] = float("nan")
    one = torch.ones(1)
    pooled, _ = native_rows.pool_rows(
        hidden, torch.tensor([0, 3]), 2 * one.to(torch.int8), 32 * one.int(), one.bool()
    )
    assert torch.isnan(pooled).all()
    normed, _ = native_rows.norm_rows(hidden, None, torch.ones(32), None, 1e-6, centred=True)
    assert torch.isnan(normed[1]).all()
    assert torch.isfinite(normed[[0, 2]]).all()


EVERY_SECOND = torch.ones(32)[::2]


def norm_of(weight: Tensor) -> twins_cpu.Norm:
    return twins_cpu.Norm(weight, None, 1e-6, centred=True)


@pytest.mark.parametrize(
    "call",
    [
        *(
            lambda x, bounds=bounds: native_rows.pool_rows(
                x[:, :32].contiguous(),
                torch.tensor(bounds),
                *torch.tensor([[2], [32], [1]]).expand(3, len(bounds) - 1),
            )
            for bounds in ((0, 5), (0, 9, 4), (-1, 2), (0, 3, 2, 4))
        ),
        lambda x: native_rows.norm_rows(x, None, torch.ones(40), None, 1e-6, centred=True),
        lambda x: native_rows.norm_rows(
            x[:, :32].contiguous(), x[:, :32], torch.ones(32), None, 0.0, centred=True
        ),
        lambda x: native_rows.norm_rows(
            x[:, :32].contiguous(), None, torch.ones(16), None, 0.0, centred=True
        ),
        lambda x: native_rows.norm_rows(x[:, :16].contiguous(), None, EVERY_SECOND, None, 0.0, centred=True),
        lambda x: native_rows.embed_rows(
            [x[:, :16].contiguous()], [torch.tensor([0])], norm_of(EVERY_SECOND)
        ),
        lambda x: native_rows.embed_rows(
            [x[:, :32].contiguous()], [torch.tensor([0])], norm_of(torch.ones(16))
        ),
        lambda x: native_rows.gated(x, "silu"),
        lambda x: native_rows.gated(x[:, :32].half(), "silu"),
        lambda x: native_rows.gated(x.view(-1, 4).expand(40, 4).T[:, :32], "silu"),
        lambda x: native_rows.rotary(x.view(4, 1, 40), torch.ones(4, 16), torch.ones(4, 16)),
        lambda x: native_rows.rotary(x[:, :32].reshape(4, 1, 32), torch.ones(3, 32), torch.ones(3, 32)),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"fit|served"):
        call(randn(4, 40))


def _exact(x: Tensor, activation: Activation) -> Tensor:
    """In float64; `twins_cpu.activate` goes through float32."""
    assert x.dtype == torch.float64
    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="none" if activation == "gelu" else "tanh")


def test_the_twin_of_activations_is_exact_too() -> None:
    x = randn(50, 16)
    for activation in ("silu", "gelu", "gelu_tanh"):
        assert_near(twins_cpu.activate(x, activation), lambda wide, a=activation: _exact(wide, a), x)
