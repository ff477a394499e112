"""A whole encoder in one native call: its layers one after the other, to the bit, and what the twin computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import native, native_encoder, native_linear, native_linear8, twins_cpu
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import EncoderLayer, Norm

pytestmark = pytest.mark.skipif(native.library is None, reason="the native kernels are not built")
few = settings(max_examples=25, deadline=None)
runs_of = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=4)
DTYPES = [torch.float32, *([torch.bfloat16] if native.level >= 3 else [])]
KINDS: list[Any] = [Panels, *([Panels8] if native_linear8.multiplies else [])]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(
    width: int,
    wide: int,
    dtype: torch.dtype,
    kinds: list[Any],
    *,
    size: int = 16,
    activation: Activation | None = "gelu",
    seed: int = 0,
    **attention: Any,
) -> EncoderLayer:
    """`kinds` of its four products: one for all, or one each."""
    shapes = (3 * width, width), (width, width), (wide, width), (width, wide)
    joint, out, up, down = (
        kind.of((randn(*shape, seed=seed) * shape[1] ** -0.5).to(dtype), randn(shape[0], seed=seed))
        for kind, shape in zip(kinds * (4 // len(kinds)), shapes, strict=True)
    )
    attended, done = (
        Norm(randn(width, seed=i) + 2, randn(width, seed=i), 1e-6, centred=True) for i in (seed, seed + 1)
    )
    return EncoderLayer(
        joint, out, up, down, attended, done, activation, width // size, scale=size**-0.5, **attention
    )


def one_by_one(hidden: Tensor, layers: Sequence[EncoderLayer], runs: list[tuple[int, int]]) -> Tensor:
    """By the native kernels of its parts."""

    def of(product: Panels | Panels8) -> Any:
        return native_linear if isinstance(product, Panels) else native_linear8

    for one in layers:
        heads = of(one.joint).linear(hidden, one.joint).view(len(hidden), 3, one.heads, -1)
        query, key, value = heads.unbind(1)
        kind: dict[str, Any] = {"scale": one.scale, "window": one.window, "softcap": one.softcap}
        mixed = native.varlen_attention(query, key, value, runs, **kind).flatten(1)
        attended = of(one.out).linear_norm(mixed, one.out, hidden, one.attended)
        wide = of(one.up).linear(attended, one.up, one.activation)
        hidden = of(one.down).linear_norm(wide, one.down, attended, one.done)
    return hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    runs=runs_of,
    shape=st.sampled_from([(32, 64, 16), (48, 16, 48), (64, 224, 32)]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=4),
    activation=st.sampled_from([None, "gelu", "gelu_tanh", "silu"]),
    attention=st.fixed_dictionaries({}, optional={"window": st.just(3), "softcap": st.just(5.0)}),
)
@few
def test_it_is_its_layers_one_after_the_other_to_the_bit(
    dtype: torch.dtype,
    runs: list[tuple[int, int]],
    shape: tuple[int, int, int],
    kinds: list[Any],
    activation: Activation | None,
    attention: dict[str, Any],
) -> None:
    width, wide, size = shape
    layers = [
        layer(width, wide, dtype, kinds, size=size, activation=activation, seed=i, **attention)
        for i in range(3)
    ]
    hidden = randn(sum(length * count for length, count in runs), width).to(dtype)
    before = hidden.clone()
    encoder = native_encoder.Encoder(layers, dtype)
    for count in (1, 2, 3):
        assert torch.equal(encoder(hidden, runs, count), one_by_one(hidden, layers[:count], runs))
    assert torch.equal(hidden, before)


@given(runs=runs_of, kind=st.sampled_from(KINDS))
@few
def test_it_computes_what_its_twin_does(runs: list[tuple[int, int]], kind: Any) -> None:
    layers = [layer(32, 64, torch.float32, [kind], seed=i) for i in range(2)]
    hidden = randn(sum(length * count for length, count in runs), 32)
    mine = native_encoder.Encoder(layers, torch.float32)(hidden, runs)
    # Where a number lies between two levels of 8 bits, the last bit of a sum decides.
    bound = 2e-5 if kind is Panels else 2e-2
    twins = twins_cpu.encoder(hidden, layers, runs)
    assert (mine - twins).norm() <= bound * twins.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_that_no_text_fills_is_none(dtype: torch.dtype) -> None:
    """Also where a token's place and the window are more than the kernels' integers hold."""
    hidden, runs = randn(40, 32).to(dtype), [(40, 1)]
    plain, wide = (
        native_encoder.Encoder([layer(32, 64, dtype, [Panels], window=window)], dtype)
        for window in (None, 2**31 - 1)
    )
    assert torch.equal(wide(hidden, runs), plain(hidden, runs))


def test_a_copy_goes_on_with_the_same_weights() -> None:
    encoder = native_encoder.Encoder([layer(32, 64, torch.float32, [Panels])], torch.float32)
    assert copy.deepcopy(encoder) is encoder


@pytest.mark.parametrize(
    "change",
    [
        {"down": "out"},
        {"joint": "up"},
        {"heads": 3},
        {"heads": 4},  # of 8
        {"attended": Norm(torch.ones(32), None, 1e-6, centred=True)},
        {"attended": Norm(torch.ones(16), torch.ones(16), 1e-6, centred=True)},
        {"done": Norm(torch.ones(32), torch.ones(32), 1e-6, centred=False)},
    ],
    ids=str,
)
def test_a_layer_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    sound = layer(32, 64, torch.float32, [Panels])
    changed = {name: getattr(sound, to) if isinstance(to, str) else to for name, to in change.items()}
    with pytest.raises(ValueError, match="natively"):
        native_encoder.Encoder([sound, replace(sound, **changed)], torch.float32)


def test_weights_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="natively"):
        native_encoder.Encoder([layer(32, 64, torch.float32, [Panels])], torch.bfloat16)


@pytest.mark.parametrize(
    ("hidden", "count"),
    [
        (randn(4, 32), 1),
        (randn(5, 48), 1),
        (randn(5, 64)[:, :32], 1),
        (randn(5, 32).double(), 1),
        (randn(5, 32), 0),
        (randn(5, 32), 2),
    ],
)
def test_rows_that_do_not_fit_are_refused(hidden: Tensor, count: int) -> None:
    encoder = native_encoder.Encoder([layer(32, 64, torch.float32, [Panels])], torch.float32)
    with pytest.raises(ValueError, match="encoder of 1"):
        encoder(hidden, [(5, 1)], count)
