"""Native linear layers compute what their torch twins do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import native, native_linear, reference, twins_cpu
from carpool.kernels.panels import Panels
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import Norm

needs_bfloat16 = pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
activations = st.sampled_from(["silu", "gelu", "gelu_tanh"])
few = settings(max_examples=20, deadline=None)
# A tile of these widths has some 100 to 800 tokens; more than one, a last one that is not whole, and few tokens.
tokens = st.one_of(st.integers(1, 14), st.sampled_from([127, 300, 901]))
sizes = st.sampled_from([16, 48, 64, 112, 384])


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).bfloat16()


def layer(outputs: int, inputs: int, *, bias: bool = True) -> Panels:
    return Panels.of(randn(outputs, inputs, scale=inputs**-0.5), randn(outputs) if bias else None)


def norm_of(width: int, *, centred: bool, bias: bool) -> Norm:
    return Norm(randn(width).float(), randn(width).float().flip(0) if bias else None, 1e-6, centred)


def error(y: Tensor, exact: Tensor) -> float:
    """The root of the mean square, relative."""
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """On the whole as near to float32 as torch's own bfloat16, and nowhere farther than twice that."""
    assert mine.dtype == torch.bfloat16
    assert mine.shape == exact.shape
    assert error(mine, exact) <= 1.1 * error(torchs, exact) + 1e-4
    bound = 2 * (torchs.float() - exact).abs().max().clamp_min(2**-8 * exact.abs().max())
    assert (mine.float() - exact).abs().max() <= bound


@given(outputs=sizes, inputs=st.sampled_from([2, 16, 38, 384]), bias=st.booleans())
@few
def test_panels_hold_the_layer(outputs: int, inputs: int, bias: bool) -> None:
    weight, start = randn(outputs, inputs), randn(outputs) if bias else None
    again, starts = Panels.of(weight, start).unpacked()
    assert torch.equal(again, weight)
    assert torch.equal(starts, torch.zeros(outputs) if start is None else start.float())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Panels.of(randn(40, 16), None),
        lambda: Panels.of(randn(32, 15), None),
        lambda: Panels.of(randn(32, 16).half(), None),
        lambda: Panels.of(randn(40, 16).float(), None),
    ],
)
def test_weights_that_no_panel_holds_are_refused(make: Callable[[], Panels]) -> None:
    with pytest.raises(ValueError, match="panels"):
        make()


@needs_bfloat16
@given(
    rows=tokens,
    outputs=sizes,
    inputs=st.sampled_from([2, 38, 384]),
    bias=st.booleans(),
    activation=st.one_of(st.none(), activations),
)
@few
def test_a_linear_layer_equals_its_twin(
    rows: int, outputs: int, inputs: int, bias: bool, activation: Activation | None
) -> None:
    x, panels = randn(rows, inputs + 2)[:, :inputs], layer(outputs, inputs, bias=bias)  # rows of wider ones
    mine = native_linear.linear(x, panels, activation)
    exact = twins_cpu.linear(x.float(), panels, activation)
    weight, start = panels.unpacked()
    torchs = F.linear(x, weight, start.bfloat16())
    torchs = torchs if activation is None else twins_cpu.activate(torchs, activation)
    assert_as_good_as_torch(mine, torchs, exact)


@needs_bfloat16
@given(
    rows=tokens,
    width=sizes,
    residual=st.booleans(),
    norm=st.one_of(st.none(), st.builds(lambda c, b: (c, b), st.booleans(), st.booleans())),
)
@few
def test_a_layer_with_its_residual_and_norm_equals_its_twin(
    rows: int, width: int, residual: bool, norm: tuple[bool, bool] | None
) -> None:
    x, panels = randn(rows, 96), layer(width, 96)
    other = randn(rows, width + 8)[:, :width] if residual else None
    last = None if norm is None else norm_of(width, centred=norm[0], bias=norm[1])
    mine = native_linear.linear_norm(x, panels, other, last)
    exact = twins_cpu.linear_norm(x.float(), panels, other, last)
    torchs = twins_cpu.linear(x, panels)
    torchs = torchs if other is None else torchs + other
    torchs = torchs if last is None else _torchs_norm(torchs, last)
    assert_as_good_as_torch(mine, torchs, exact)


# ── in float32 ───────────────────────────────────────────────────────────────────────────────────────────────


needs_native = pytest.mark.skipif(native.library is None, reason="the native kernels are not built")
WIDE_LEVELS = range(1, min(native.level, 2) + 1)  # beyond AVX-512 there is nothing more for float32


def wide(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_as_good_as_torchs_float32(mine: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Against float64, on the whole and where it is worst; units of the last place are what order alone may cost."""
    assert mine.dtype == torch.float32
    assert mine.shape == exact.shape
    assert error(mine, exact) <= 2 * error(torchs, exact) + 2**-23
    bound = 2 * (torchs.double() - exact).abs().max() + 4 * 2**-23 * exact.abs().max()
    assert (mine.double() - exact).abs().max() <= bound


@needs_native
@pytest.mark.parametrize("level", WIDE_LEVELS)
@given(
    rows=tokens,
    outputs=sizes,
    inputs=st.sampled_from([1, 38, 384, 3000]),
    bias=st.booleans(),
    activation=st.one_of(st.none(), activations),
)
@few
def test_a_layer_in_float32_equals_its_twin(
    level: int, rows: int, outputs: int, inputs: int, bias: bool, activation: Activation | None
) -> None:
    x, weight = wide(rows, inputs + 2)[:, :inputs], wide(outputs, inputs, scale=inputs**-0.5)
    start = wide(outputs) if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", level)
        panels = Panels.of(weight, start)
        mine = native_linear.linear(x, panels, activation)
    again, starts = panels.unpacked()
    assert torch.equal(again, weight)
    assert torch.equal(starts, torch.zeros(outputs) if start is None else start)
    exact = F.linear(x.double(), weight.double(), None if start is None else start.double())
    torchs = F.linear(x, weight, start)
    if activation is not None:
        torchs = twins_cpu.activate(torchs, activation)
        exact = (
            F.silu(exact)
            if activation == "silu"
            else F.gelu(exact, approximate="none" if activation == "gelu" else "tanh")
        )
    assert_as_good_as_torchs_float32(mine, torchs, exact)


@needs_native
@pytest.mark.parametrize("level", WIDE_LEVELS)
@given(
    rows=tokens,
    width=sizes,
    residual=st.booleans(),
    norm=st.one_of(st.none(), st.builds(lambda c, b: (c, b), st.booleans(), st.booleans())),
)
@few
def test_a_layer_in_float32_with_its_residual_and_norm_equals_its_twin(
    level: int, rows: int, width: int, residual: bool, norm: tuple[bool, bool] | None
) -> None:
    x, weight = wide(rows, 96), wide(width, 96, scale=0.1)
    other = wide(rows, width + 8)[:, :width] if residual else None
    last = None if norm is None else norm_of(width, centred=norm[0], bias=norm[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", level)
        panels = Panels.of(weight, None)
        mine = native_linear.linear_norm(x, panels, other, last)
    exact = F.linear(x.double(), weight.double()) + (0 if other is None else other.double())
    if last is not None:
        exact = exact - exact.mean(1, keepdim=True) if last.centred else exact
        exact = exact * torch.rsqrt(exact.square().mean(1, keepdim=True) + last.eps) * last.weight.double()
        exact = exact if last.bias is None else exact + last.bias.double()
    assert_as_good_as_torchs_float32(mine, twins_cpu.linear_norm(x, panels, other, last), exact)


@needs_native
@pytest.mark.parametrize("level", WIDE_LEVELS)
def test_in_float32_a_token_comes_out_the_same_in_any_company(
    level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "level", level)
    x, up = wide(300, 384), Panels.of(wide(768, 384, scale=0.05), None)
    x[7, 3] = float("nan")
    whole = native_linear.linear(x, up, "gelu")
    assert torch.isnan(whole[7]).all()
    for first, last in ((0, 1), (8, 12), (130, 291), (299, 300)):
        assert torch.equal(native_linear.linear(x[first:last], up, "gelu"), whole[first:last])


@needs_native
@pytest.mark.skipif(native.level < 2, reason="no AVX-512 here")
def test_panels_made_for_another_level_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, panels = wide(4, 64), Panels.of(wide(64, 64), None)
    assert native_linear.linear(x, panels).shape == (4, 64)
    monkeypatch.setattr(native, "level", 1)
    with pytest.raises(ValueError, match="panels"):
        native_linear.linear(x, panels)


# ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_bfloat16
def test_a_token_comes_out_the_same_in_any_company() -> None:
    x, up, same = randn(700, 384), layer(1536, 384), layer(384, 384)
    norm = norm_of(384, centred=True, bias=True)
    whole, normed = native_linear.linear(x, up, "gelu"), native_linear.linear_norm(x, same, x, norm)
    for first, last in ((0, 1), (5, 12), (130, 431), (699, 700)):
        part = x[first:last]
        assert torch.equal(native_linear.linear(part, up, "gelu"), whole[first:last])
        assert torch.equal(native_linear.linear_norm(part, same, part, norm), normed[first:last])


@needs_bfloat16
def test_a_number_that_is_none_stays_in_its_row() -> None:
    x = randn(20, 64)
    x[7, 3] = float("nan")
    whole = norm_of(64, centred=True, bias=True)
    for y in (
        native_linear.linear(x, layer(128, 64), "gelu"),
        native_linear.linear_norm(x, layer(64, 64), x, whole),
    ):
        assert torch.isnan(y[7]).all()
        assert torch.isfinite(y[[*range(7), *range(8, 20)]]).all()


@needs_bfloat16
def test_no_tokens_give_none() -> None:
    assert native_linear.linear(randn(0, 64), layer(32, 64)).shape == (0, 32)


@needs_bfloat16
@pytest.mark.parametrize(
    "call",
    [
        lambda: native_linear.linear(randn(4, 64).float(), layer(32, 64)),
        lambda: native_linear.linear_norm(randn(4, 64), layer(32, 64), randn(4, 32).float(), None),
        lambda: native_linear.linear(randn(4, 32), layer(32, 64)),
        lambda: native_linear.linear(randn(64, 4).T, layer(32, 64)),
        lambda: native_linear.linear_norm(randn(4, 64), layer(32, 64), randn(4, 64), None),
        lambda: native_linear.linear_norm(randn(4, 64), layer(32, 64), randn(3, 32), None),
        lambda: native_linear.linear_norm(
            randn(4, 64), layer(32, 64), None, norm_of(64, centred=True, bias=False)
        ),
        lambda: native_linear.linear_norm(
            randn(4, 64), layer(32, 64), None, Norm(torch.ones(64)[::2], None, 1e-6, centred=True)
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"layer|residual|norm"):
        call()


def test_rows_of_no_inputs_are_left_to_torch() -> None:
    assert not native_linear.serves(torch.empty(16, 0))


def test_a_cpu_that_does_not_multiply_bfloat16_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level", 2)
    assert not native_linear.serves(randn(4, 64))


def _torchs_norm(x: Tensor, norm: Norm) -> Tensor:
    """Of the rounded sum, as torch has it."""
    return reference.norm_rows(x, None, norm.weight, norm.bias, norm.eps, centred=norm.centred)[0]


@needs_bfloat16
def test_a_gelu_in_bfloat16_is_within_a_rounding_on_both_sides_of_its_bend() -> None:
    """Far to the right it is its input, far to the left nothing, of NaN NaN."""
    x = torch.cat((torch.linspace(-8, 8, 16 * 512), torch.tensor([-1e30, 1e30, float("nan")] + [0.0] * 13)))
    x = x.bfloat16().view(-1, 16)
    mine = native_linear.linear(x.nan_to_num(0.0), Panels.of(torch.eye(16).bfloat16(), None), "gelu")
    exact = F.gelu(x.nan_to_num(0.0).float())
    assert ((mine.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
    assert native_linear.linear(x[-1:], Panels.of(torch.eye(16).bfloat16(), None), "gelu")[0].isnan().all()
