"""Native 8-bit linear layers compute what their torch twins do, on the very integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import native, native_linear8, twins_cpu
from carpool.kernels.panels8 import Panels8, quantized
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import Norm, leveled

needs_integers = pytest.mark.skipif(
    not native_linear8.multiplies, reason="no AVX-512 VNNI here, or not built"
)
few = settings(max_examples=40, deadline=None)
# A tile of these widths has some 130 to 3,000 tokens; more than one, a last one that is not whole, and few tokens.
tokens = st.one_of(st.integers(1, 70), st.sampled_from([300, 901]))
sizes = st.sampled_from([16, 32, 48, 64, 80, 112, 384])
DTYPES = [torch.float32, *([torch.bfloat16] if native.level >= 3 else [])]
dtypes = st.sampled_from(DTYPES)
norms = st.one_of(st.none(), st.builds(lambda c, b: (c, b), st.booleans(), st.booleans()))


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def layer(outputs: int, inputs: int, *, bias: bool = True) -> Panels8:
    return Panels8.of(randn(outputs, inputs, scale=inputs**-0.5), randn(outputs) if bias else None)


def norm_of(width: int, *, centred: bool, bias: bool) -> Norm:
    return Norm(randn(width), randn(width).flip(0) if bias else None, 1e-6, centred)


def assert_equal(mine: Tensor, twins: Tensor) -> None:
    """But for the order of float32 operations behind the integers, and then one rounding to the rows' dtype."""
    assert (mine.dtype, mine.shape) == (twins.dtype, twins.shape)
    bound = 4e-6 if mine.dtype == torch.float32 else 2**-7  # one step of either
    assert (mine.float() - twins.float()).abs().max() <= bound * twins.float().abs().max() + 1e-30


@given(
    outputs=sizes, inputs=sizes, bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@few
def test_panels_hold_the_integers(outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
    weight, start = randn(outputs, inputs, dtype=dtype), randn(outputs) if bias else None
    panels = Panels8.of(weight, start)
    whole, step = quantized(weight)
    assert torch.equal(panels.unpacked(), whole)
    assert torch.equal(panels.step[:outputs], step[:, 0])
    assert torch.equal(panels.sum[:outputs], whole.sum(1) * step[:, 0])
    assert torch.equal(panels.bias[:outputs], torch.zeros(outputs) if start is None else start)
    assert all(len(x) % 64 == 0 and not x[outputs:].any() for x in (panels.step, panels.sum, panels.bias))


def test_a_weights_step_is_a_127th_of_its_rows_largest_of_either_sign() -> None:
    whole, step = quantized(torch.tensor([[1.0, -254.0, 0.0], [0.5, 0.25, 0.1], [0.0, 0.0, 0.0]]))
    assert whole.tolist() == [[0, -127, 0], [127, 64, 25], [0, 0, 0]]
    assert step[:2, 0].tolist() == [2.0, pytest.approx(0.5 / 127)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Panels8.of(randn(40, 16), None),
        lambda: Panels8.of(randn(32, 20), None),
        lambda: Panels8.of(torch.ones(32, 16, dtype=torch.int8), None),
    ],
)
def test_weights_that_no_panel_holds_are_refused(make: Callable[[], Panels8]) -> None:
    with pytest.raises(ValueError, match="panels"):
        make()


@needs_integers
@given(rows=st.integers(1, 70), outputs=sizes, inputs=st.sampled_from([16, 80, 384, 1536]), dtype=dtypes)
@few
def test_a_product_is_that_of_the_integers_to_the_last_bit(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Planted so that every scale is 1: levels and weights are what they were made of, and float32 holds every sum."""
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randint(0, 256, (rows, inputs), generator=generator)
    x[:, 0], x[:, -1] = 0, 255  # from the first level to the last
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator)
    weight[:, 1] = 127
    expected = x @ weight.T
    mine = native_linear8.linear(x.to(dtype), Panels8.of(weight.float(), None))
    assert torch.equal(mine, expected.to(torch.float32).to(dtype))


@needs_integers
@given(
    rows=tokens,
    outputs=sizes,
    inputs=sizes,
    bias=st.booleans(),
    activation=st.one_of(st.none(), st.sampled_from(["silu", "gelu", "gelu_tanh"])),
    dtype=dtypes,
)
@few
def test_a_linear_layer_equals_its_twin(
    rows: int, outputs: int, inputs: int, bias: bool, activation: Activation | None, dtype: torch.dtype
) -> None:
    x, panels = randn(rows, inputs + 2, dtype=dtype)[:, :inputs], layer(outputs, inputs, bias=bias)
    mine = native_linear8.linear(x, panels, activation)
    assert_equal(mine, twins_cpu.linear8(x, panels, activation))


@needs_integers
@given(rows=tokens, width=sizes, residual=st.booleans(), norm=norms, dtype=dtypes)
@few
def test_a_layer_with_its_residual_and_norm_equals_its_twin(
    rows: int, width: int, residual: bool, norm: tuple[bool, bool] | None, dtype: torch.dtype
) -> None:
    x, panels = randn(rows, 96, dtype=dtype), layer(width, 96)
    other = randn(rows, width + 8, dtype=dtype)[:, :width] if residual else None
    last = None if norm is None else norm_of(width, centred=norm[0], bias=norm[1])
    mine = native_linear8.linear_norm(x, panels, other, last)
    assert_equal(mine, twins_cpu.linear8_norm(x, panels, other, last))


@needs_integers
@pytest.mark.parametrize("inputs", [16, 48, 64, 112])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_height_and_size_are_rounded_as_the_twin_rounds_them(
    inputs: int, dtype: torch.dtype
) -> None:
    """Equal numbers, zeros, one that stands out, steps from 1e-12 to 1e30, numbers far from zero."""
    rows = randn(90, inputs) * torch.logspace(-12, 30, 90)[:, None]
    rows[3], rows[4], rows[5, 7] = 0.0, -2.5, 1e4
    rows[6:9] += 1e6
    rows = rows.to(dtype)
    panels = Panels8.of(torch.eye(inputs), None)  # an output is an input, rounded to its level
    levels, height, smallest = leveled(rows)
    mine = native_linear8.linear(rows, panels)
    expected = (levels.double() * height + smallest).to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 2**-7  # one step
    scale = expected.double().abs().amax(1, keepdim=True) + 1e-18
    assert ((mine.double() - expected.double()).abs() / scale).max() <= bound
    assert torch.equal(mine[3], torch.zeros(inputs, dtype=dtype))


@needs_integers
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_comes_out_the_same_in_any_company(dtype: torch.dtype) -> None:
    x, up, same = randn(700, 384, dtype=dtype), layer(1536, 384), layer(384, 384)
    norm = norm_of(384, centred=True, bias=True)
    whole, normed = native_linear8.linear(x, up, "gelu"), native_linear8.linear_norm(x, same, x, norm)
    for first, last in ((0, 1), (5, 12), (130, 431), (699, 700)):
        part = x[first:last]
        assert torch.equal(native_linear8.linear(part, up, "gelu"), whole[first:last])
        assert torch.equal(native_linear8.linear_norm(part, same, part, norm), normed[first:last])


@needs_integers
@pytest.mark.parametrize("bad", [(float("nan"),), (float("inf"),), (float("-inf"),), (3e38, -3e38)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_makes_its_row_none_and_no_other(
    dtype: torch.dtype, bad: tuple[float, ...]
) -> None:
    x = randn(20, 64, dtype=dtype)
    x[7, 3 : 3 + len(bad)] = torch.tensor(bad)
    whole = norm_of(64, centred=True, bias=True)
    for mine, twins in (
        (native_linear8.linear(x, layer(128, 64), "gelu"), twins_cpu.linear8(x, layer(128, 64), "gelu")),
        (
            native_linear8.linear_norm(x, layer(64, 64), None, whole),
            twins_cpu.linear8_norm(x, layer(64, 64), None, whole),
        ),
    ):
        for y in (mine, twins):
            assert torch.isnan(y[7]).all()
            assert torch.isfinite(y[[*range(7), *range(8, 20)]]).all()


@needs_integers
def test_no_tokens_give_none() -> None:
    assert native_linear8.linear(randn(0, 64), layer(32, 64)).shape == (0, 32)


@needs_integers
def test_its_input_is_not_written_to() -> None:
    x = randn(5, 64)
    native_linear8.linear_norm(x, layer(64, 64), x, norm_of(64, centred=True, bias=False))
    assert torch.equal(x, randn(5, 64))


@needs_integers
@pytest.mark.parametrize(
    "call",
    [
        lambda: native_linear8.linear(randn(4, 64).half(), layer(32, 64)),
        lambda: native_linear8.linear(randn(4, 32), layer(32, 64)),
        lambda: native_linear8.linear(randn(64, 4).T, layer(32, 64)),
        lambda: native_linear8.linear_norm(randn(4, 64), layer(32, 64), randn(4, 64), None),
        lambda: native_linear8.linear_norm(randn(4, 64), layer(32, 64), randn(4, 32).bfloat16(), None),
        lambda: native_linear8.linear_norm(
            randn(4, 64), layer(32, 64), None, norm_of(64, centred=True, bias=False)
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"layer|residual|norm"):
        call()


@needs_integers
def test_a_product_that_an_int32_may_not_hold_is_not_made() -> None:
    assert 255 * 127 * 66_304 < 2**31 < 255 * 127 * 66_320
    assert native_linear8.serves(torch.empty(1, 66_304))
    assert not native_linear8.serves(torch.empty(1, 66_320))


@needs_integers
def test_a_cpu_that_does_not_multiply_integers_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_linear8.serves(randn(4, 64))
    monkeypatch.setattr(native, "level", 2)
    assert native_linear8.serves(randn(4, 64))
    assert not native_linear8.serves(randn(4, 64).bfloat16())
    monkeypatch.setattr(native_linear8, "multiplies", False)
    assert not native_linear8.serves(randn(4, 64))
