"""The AMX kernels compute what their torch twins do: their own source, on tiles in software. Not run on AMX yet."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from carpool.kernels import crew, native, native_linear, native_linear8, native_pages, reference, twins_cpu
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import Norm
from emu import soft

pytestmark = pytest.mark.skipif(soft.MISSING is not None, reason=str(soft.MISSING))
few = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def tiles() -> Iterator[ctypes.CDLL]:
    """The kernels on software tiles, in place of the library that is built here."""
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch)


def install(patch: pytest.MonkeyPatch, changes: dict[str, dict[str, str]] | None = None) -> ctypes.CDLL:
    library = soft.library(changes)
    patch.setattr(native, "library", library)
    patch.setattr(native, "level", library.carpool_cpu_level())
    return library


def assert_no_fault() -> None:
    assert native.library is not None
    assert native.library.carpool_tile_fault() is None


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).bfloat16()


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Nowhere farther from float32 than twice torch's own bfloat16."""
    assert mine.dtype == torch.bfloat16
    assert mine.shape == exact.shape
    bound = 2 * (torchs.float() - exact).abs().max().clamp_min(2**-8 * exact.abs().max())
    assert (mine.float() - exact).abs().max() <= bound


def test_it_is_the_highest_level_and_is_told_of(tiles: ctypes.CDLL) -> None:
    assert native.level == native.AMX
    assert native.LEVELS[native.level] == "AMX BF16"


def test_what_computes_the_same_as_avx_512_is_trusted() -> None:
    assert native.tried(native.AMX) == native.AMX


@pytest.mark.parametrize(
    ("file", "there", "instead"),
    [
        ("attention_amx.cpp", "TILE, 2 * laid.deep * TILE, 2 * DEPTH}", "TILE, TILE, 2 * DEPTH}"),
        ("linear8_amx.cpp", "{rest, STEP, 0, PANEL_ROW}", "{rest, STEP, 0, STEP}"),
    ],
)
def test_what_does_not_is_left_to_the_level_below(file: str, there: str, instead: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, {file: {there: instead}})
        assert native.tried(native.AMX) == native.AMX - 1


class Elsewhere:
    """The library as on a CPU whose tiles the kernel keeps for itself."""

    def carpool_has_amx(self) -> int:
        return -1


def test_it_is_told_why_the_best_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._setback(native.AMX) is None
    monkeypatch.setattr(native, "level", native.AMX - 1)
    assert native._setback(native.AMX) == (
        "AMX BF16 computes something else on this CPU than AVX-512 BF16, which serves in its place."
    )
    monkeypatch.setattr(native, "library", Elsewhere())
    assert native._setback(native.AMX - 1) == (
        "Linux does not lend this process the AMX that its CPU has: AVX-512 BF16 serves, slower. "
        "It does from version 5.16 on, unless a sandbox (seccomp, gVisor) refuses arch_prctl."
    )


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────


def made(lengths: list[int], heads: tuple[int, int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    row = randn(sum(lengths), heads[0] + 2 * heads[1], size)
    query, key, value = row.split([heads[0], heads[1], heads[1]], dim=1)  # type: ignore[no-untyped-call]
    return 2 * query, key, value


def check_attention(lengths: list[int], heads: tuple[int, int], size: int, **how: Any) -> None:
    query, key, value = made(lengths, heads, size)
    runs = [(length, 1) for length in lengths]
    exact = reference.varlen_attention(query.float(), key.float(), value.float(), runs, **how)
    mine = native.varlen_attention(query, key, value, runs, **how)
    assert_no_fault()
    assert_as_good_as_torch(mine, reference.varlen_attention(query, key, value, runs, **how), exact)


@given(
    lengths=st.lists(
        st.one_of(st.integers(1, 50), st.sampled_from([64, 65, 255, 256, 257, 300])), min_size=1, max_size=4
    ),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    size=st.sampled_from([16, 32, 48, 64, 80, 96, 128, 256]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 70)),
    softcap=st.sampled_from([None, 5.0]),
    biased=st.booleans(),
)
@few
def test_attention_equals_its_twin(
    lengths: list[int],
    heads: tuple[int, int],
    size: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
    biased: bool,
) -> None:
    how: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    if biased and heads[0] == heads[1]:
        how["bias"] = 3 * randn(heads[0], 2 * max(lengths) - 1)
    check_attention(lengths, heads, size, scale=size**-0.5, **how)


@pytest.mark.parametrize("rising", [True, False])
def test_scores_that_outgrow_those_before_by_far_leave_nothing_of_them(rising: bool) -> None:
    """Over several blocks of keys: each has larger scores than the one before it, or smaller."""
    query, key, value = made([700], (1, 1), 32)
    growth = torch.linspace(0.1, 30, 700)[:, None, None]
    key, query = (key.float() * (growth if rising else growth.flip(0))).bfloat16(), query.abs()
    key = key.abs()
    exact = reference.varlen_attention(query.float(), key.float(), value.float(), [(700, 1)], scale=0.3)
    mine = native.varlen_attention(query, key, value, [(700, 1)], scale=0.3)
    torchs = reference.varlen_attention(query, key, value, [(700, 1)], scale=0.3)
    assert_as_good_as_torch(mine, torchs, exact)


def test_attention_to_pages_is_that_within_whole_prompts() -> None:
    """Prompts of 70, 40, 9 and 20 tokens in pages of 16, each page anywhere; the last 33, 40, 9 and no tokens ask."""
    lengths, asked, size = [70, 40, 9, 20], [33, 40, 9, 0], 48
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(1)).int()
    caches = [torch.full((12, 16, 2, size), float("nan")).bfloat16() for _ in range(2)]
    table, queries, expected = torch.full((4, 5), -1, dtype=torch.int32), [], []
    used = 0
    for b, (length, last) in enumerate(zip(lengths, asked, strict=True)):
        query, key, value = made([length], (4, 2), size)
        own = pages[used : used + -(-length // 16)]
        used, table[b, : len(own)] = used + len(own), own
        for cache, rows in zip(caches, (key, value), strict=True):
            for token in range(length):
                cache[own[token // 16], token % 16] = rows[token]
        whole = native.varlen_attention(query, key, value, [(length, 1)], scale=0.2, causal=True, window=50)
        queries.append(query[length - last :])
        expected.append(whole[length - last :])
    mine = native_pages.paged_attention(
        torch.cat(queries),
        caches[0],
        caches[1],
        table,
        torch.tensor([0, 33, 73, 82, 82]),
        torch.tensor(lengths),
        40,
        scale=0.2,
        window=50,
    )
    assert_no_fault()
    assert (mine.float() - torch.cat(expected).float()).abs().max() <= 2**-7 * mine.float().abs().max()


def test_a_sequence_comes_out_the_same_in_any_company() -> None:
    lengths = [40, 5, 300, 16, 9, 33]
    query, key, value = made(lengths, (2, 2), 32)
    whole = native.varlen_attention(query, key, value, [(length, 1) for length in lengths], scale=0.2)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = native.varlen_attention(query[rows], key[rows], value[rows], [(length, 1)], scale=0.2)
        assert torch.equal(alone, whole[rows])
        start += length


def test_a_number_that_is_none_does_not_get_lost() -> None:
    query, key, value = made([33, 20], (2, 2), 32)
    query[5, 0, 3] = key[40, 1, 0] = float("nan")
    lost = native.varlen_attention(query, key, value, [(33, 1), (20, 1)], scale=1.0).isnan().any(2)
    expected = torch.zeros(53, 2, dtype=torch.bool)
    expected[5, 0] = expected[33:, 1] = True
    assert torch.equal(lost, expected)


def test_extreme_scores_stay_finite() -> None:
    query, key, value = made([300], (2, 2), 32)
    assert native.varlen_attention(1e4 * query, 1e4 * key, value, [(300, 1)], scale=1.0).isfinite().all()


# ── linear layers ────────────────────────────────────────────────────────────────────────────────────────────


def layer(outputs: int, inputs: int, *, bias: bool = True) -> Panels:
    panels = Panels.of(randn(outputs, inputs, scale=inputs**-0.5), randn(outputs) if bias else None)
    assert panels.tiled
    return panels


@given(outputs=st.sampled_from([16, 32, 48, 112]), inputs=st.sampled_from([2, 32, 38, 96]))
@few
def test_tiles_hold_the_layer(outputs: int, inputs: int) -> None:
    weight, bias = randn(outputs, inputs), randn(outputs)
    again, starts = Panels.of(weight, bias).unpacked()
    assert torch.equal(again, weight)
    assert torch.equal(starts, bias.float())


def check_linear(
    rows: int, outputs: int, inputs: int, activation: Activation | None, *, bias: bool = True
) -> None:
    x, panels = randn(rows, inputs + 2)[:, :inputs], layer(outputs, inputs, bias=bias)  # rows of wider ones
    mine = native_linear.linear(x, panels, activation)
    assert_no_fault()
    weight, start = panels.unpacked()
    torchs = F.linear(x, weight, start.bfloat16())
    torchs = torchs if activation is None else twins_cpu.activate(torchs, activation)
    assert_as_good_as_torch(mine, torchs, twins_cpu.linear(x.float(), panels, activation))


# A tile has at most 256 tokens; 800 inputs are more than two chunks.
tokens = st.one_of(st.integers(1, 70), st.just(300))
sizes = st.sampled_from([16, 32, 48, 112])


@given(
    rows=tokens,
    outputs=sizes,
    inputs=st.sampled_from([2, 38, 64, 384, 800]),
    bias=st.booleans(),
    activation=st.sampled_from([None, "silu", "gelu", "gelu_tanh"]),
)
@few
def test_a_linear_layer_equals_its_twin(
    rows: int, outputs: int, inputs: int, bias: bool, activation: Activation | None
) -> None:
    check_linear(rows, outputs, inputs, activation, bias=bias)


@given(
    rows=tokens,
    width=sizes,
    inputs=st.sampled_from([38, 96, 800]),
    residual=st.booleans(),
    norm=st.one_of(st.none(), st.tuples(st.booleans(), st.booleans())),
)
@few
def test_a_layer_with_its_residual_and_norm_equals_its_twin(
    rows: int, width: int, inputs: int, residual: bool, norm: tuple[bool, bool] | None
) -> None:
    x, panels = randn(rows, inputs), layer(width, inputs)
    other = randn(rows, width + 8)[:, :width] if residual else None
    last = None
    if norm is not None:
        last = Norm(randn(width).float(), randn(width).float().flip(0) if norm[1] else None, 1e-6, norm[0])
    mine = native_linear.linear_norm(x, panels, other, last)
    assert_no_fault()
    torchs = twins_cpu.linear(x, panels)
    torchs = torchs if other is None else torchs + other
    if last is not None:
        torchs = reference.norm_rows(torchs, None, last.weight, last.bias, last.eps, centred=last.centred)[0]
    assert_as_good_as_torch(mine, torchs, twins_cpu.linear_norm(x.float(), panels, other, last))


def test_a_token_comes_out_the_same_in_any_company() -> None:
    x, up, down = randn(300, 416), layer(96, 416), layer(416, 416)
    norm = Norm(randn(416).float(), None, 1e-6, centred=True)
    whole, normed = native_linear.linear(x, up, "gelu"), native_linear.linear_norm(x, down, x, norm)
    for first, last in ((0, 1), (5, 12), (30, 131), (299, 300)):
        part = x[first:last]
        assert torch.equal(native_linear.linear(part, up, "gelu"), whole[first:last])
        assert torch.equal(native_linear.linear_norm(part, down, part, norm), normed[first:last])


def test_no_tokens_give_none() -> None:
    assert native_linear.linear(randn(0, 64), layer(32, 64)).shape == (0, 32)


def test_tiles_are_not_multiplied_at_a_level_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = layer(32, 64)
    monkeypatch.setattr(native, "level", native.AMX - 1)
    with pytest.raises(ValueError, match="layer"):
        native_linear.linear(randn(4, 64), panels)


# ── linear layers in 8-bit integers ──────────────────────────────────────────────────────────────────────────

needs_integers = pytest.mark.skipif(
    not native_linear8.multiplies, reason="no AVX-512 VNNI here to compare with"
)


def in_tiles_and_in_lanes(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """By tdpbusd and by vpdpbusd."""
    mine = call()
    assert_no_fault()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", native.AMX - 1)
        return mine, call()


def check_integers(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, activation: Activation | None = None
) -> None:
    x = randn(rows, inputs + 16).to(dtype)[:, :inputs]
    panels = Panels8.of(randn(outputs, inputs, scale=inputs**-0.5), randn(outputs))
    mine, other = in_tiles_and_in_lanes(lambda: native_linear8.linear(x, panels, activation))
    assert torch.equal(mine, other)


either = st.sampled_from([torch.float32, torch.bfloat16])
# 48 inputs are less than a step; 880 are more than a chunk, and a step that is not whole.
depths = st.sampled_from([16, 48, 64, 80, 384, 880])


@needs_integers
@given(
    rows=tokens,
    outputs=st.sampled_from([16, 48, 64, 112]),
    inputs=depths,
    dtype=either,
    activation=st.sampled_from([None, "silu", "gelu", "gelu_tanh"]),
)
@few
def test_integers_in_tiles_give_what_they_give_in_lanes_to_the_bit(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, activation: Activation | None
) -> None:
    check_integers(rows, outputs, inputs, dtype, activation)


@needs_integers
@given(rows=tokens, width=sizes, inputs=depths, dtype=either, norm=st.booleans())
@few
def test_so_they_do_with_a_residual_and_a_norm(
    rows: int, width: int, inputs: int, dtype: torch.dtype, norm: bool
) -> None:
    x, other = randn(rows, inputs).to(dtype), randn(rows, width + 8).to(dtype)[:, :width]
    panels = Panels8.of(randn(width, inputs, scale=inputs**-0.5), None)
    last = Norm(randn(width).float(), randn(width).float().flip(0), 1e-6, centred=True) if norm else None
    mine, lanes = in_tiles_and_in_lanes(lambda: native_linear8.linear_norm(x, panels, other, last))
    assert torch.equal(mine, lanes)


@needs_integers
def test_what_lies_behind_the_weights_counts_for_nothing() -> None:
    """80 inputs are a step and a quarter, and the last panel's end where the memory may."""
    x, panels = torch.randn(5, 80), Panels8.of(torch.randn(128, 80), None)
    poisoned = torch.full((panels.weight.numel() + 4096,), 127, dtype=torch.int8)
    poisoned[: panels.weight.numel()] = panels.weight.flatten()
    weight = poisoned[: panels.weight.numel()].view_as(panels.weight)
    again = Panels8(weight, panels.step, panels.sum, panels.bias, panels.inputs, panels.outputs)
    assert torch.equal(native_linear8.linear(x, again), native_linear8.linear(x, panels))


@needs_integers
def test_a_number_that_is_none_stays_in_its_row_of_integers() -> None:
    x, panels = torch.randn(40, 64), Panels8.of(torch.randn(32, 64), None)
    x[7, 3] = float("nan")
    assert native_linear8.linear(x, panels).isnan().any(1).nonzero().flatten().tolist() == [7]


# ── that faults are found ────────────────────────────────────────────────────────────────────────────────────


def multiply() -> None:
    check_linear(20, 48, 96, None)


def multiply_integers() -> None:
    check_integers(40, 48, 80, torch.bfloat16)


def attend() -> None:
    check_attention([40], (1, 1), 32, scale=0.01)


@pytest.mark.parametrize(
    ("file", "there", "instead", "check", "found"),
    [
        ("linear_amx.cpp", "TILE, 2 * TILE, 2 * DEPTH}", "TILE, 2 * TILE, DEPTH}", multiply, "<="),
        ("attention_amx.cpp", "who_sees(s, j + i, length,", "who_sees(s, j + i, 1 << 30,", attend, "<="),
        ("linear_amx.cpp", "const Tiles tiles;", "", multiply, "used while none are configured"),
        (
            "linear8_amx.cpp",
            "{rest, STEP, 0, PANEL_ROW}",
            "{rest, 0, 0, PANEL_ROW}",
            multiply_integers,
            "equal",
        ),
        ("linear8_amx.cpp", "const Tiles tiles;", "", multiply_integers, "used while none are configured"),
    ],
    ids=[
        "a wrong stride",
        "no mask behind the last key",
        "tiles that are not configured",
        "integers beside their place",
        "tiles that are not configured for integers",
    ],
)
def test_a_planted_fault_is_found(
    file: str, there: str, instead: str, check: Callable[[], None], found: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, {file: {there: instead}})
        with pytest.raises(AssertionError, match=found):
            check()


# ── the tiles themselves ─────────────────────────────────────────────────────────────────────────────────────


def config(*shapes: tuple[int, int], palette: int = 1) -> bytes:
    """Of tiles of (rows, bytes a row), as `ldtilecfg` reads it."""
    rows, sizes = (np.zeros(16, kind) for kind in ("u1", "<u2"))
    for i, (count, size) in enumerate(shapes):
        rows[i], sizes[i] = count, size
    return bytes([palette, 0, *[0] * 14]) + sizes.tobytes() + rows.tobytes()


def product(
    tiles: ctypes.CDLL, shapes: bytes, sums: NDArray[np.float32], left: Tensor, right: Tensor
) -> NDArray[np.float32]:
    """sums [16, 16] + left [16, 32] · right [16, 16, 2], bfloat16."""
    out = sums.copy()
    tiles.soft_product(
        shapes, out.ctypes.data_as(ctypes.c_void_p), native.pointer(left), native.pointer(right)
    )
    return out


def flushed(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x).astype(np.float32)


def test_a_product_is_the_processors_to_the_bit(tiles: ctypes.CDLL) -> None:
    """Even and odd halves summed apart; each product exact in float64, so its sum is rounded once, as if fused."""
    left, right = randn(16, 32), randn(16, 16, 2)
    left[2] *= 1e-25
    right[:, 3] *= 1e-20  # products of these two are subnormal
    left[4, 5] = 1e-39  # and so is this
    sums = randn(16, 16).float().numpy()
    halves = []
    for half in (0, 1):
        a, b = (flushed(x.float().numpy()) for x in (left[:, half::2], right[:, :, half]))
        total = np.zeros((16, 16), np.float32)
        for k in range(16):
            exact = total.astype(np.float64) + np.outer(a[:, k].astype(np.float64), b[k].astype(np.float64))
            total = flushed(exact.astype(np.float32))
        halves.append(total)
    expected = flushed(sums + flushed(halves[0] + halves[1]))
    got = product(tiles, config((16, 64), (16, 64), (16, 64)), sums, left, right)
    assert np.array_equal(got, expected)
    assert tiles.carpool_tile_fault() is None


def test_a_product_of_bytes_is_of_unsigned_ones_and_signed_ones(tiles: ctypes.CDLL) -> None:
    some = np.random.default_rng(0)
    left = some.integers(0, 256, (16, 64), dtype=np.uint8)
    right = some.integers(-128, 128, (16, 16, 4), dtype=np.int8)
    sums = some.integers(-(2**31), 2**31, (16, 16), dtype=np.int32)
    expected = sums.astype(np.int64) + left.astype(np.int64) @ right.transpose(0, 2, 1).reshape(64, 16)
    tiles.soft_product_of_bytes(*(x.ctypes.data_as(ctypes.c_void_p) for x in (sums, left, right)))
    assert tiles.carpool_tile_fault() is None
    assert np.array_equal(sums, expected.astype(np.int32))


def test_tiles_of_fewer_rows_leave_the_rest(tiles: ctypes.CDLL) -> None:
    left, right, sums = randn(16, 32), randn(16, 16, 2), np.ones((16, 16), np.float32)
    got = product(tiles, config((5, 28), (5, 24), (6, 28)), sums, left, right)
    assert tiles.carpool_tile_fault() is None
    some = right[:6, :7].float().permute(0, 2, 1).reshape(12, 7)
    assert np.allclose(got[:5, :7], 1 + (left[:5, :12].float() @ some).numpy(), atol=1e-5)
    assert (got[5:] == 1).all()
    assert (got[:, 7:] == 1).all()


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        (config((16, 64), (16, 64), (16, 64), palette=2), b"a configuration that there is not"),
        (config((17, 64), (16, 64), (16, 64)), b"a configuration that there is not"),
        (config((16, 64), (16, 66), (16, 64)), b"a configuration that there is not"),
        (config((16, 64), (16, 64)), b"a tile used that has no rows"),
        (config((16, 64), (16, 60), (16, 64)), b"a product of tiles that do not fit each other"),
        (config((15, 64), (16, 64), (16, 64)), b"a product of tiles that do not fit each other"),
    ],
)
def test_what_the_processor_refuses_is_a_fault(tiles: ctypes.CDLL, shapes: bytes, fault: bytes) -> None:
    product(tiles, shapes, np.zeros((16, 16), np.float32), randn(16, 32), randn(16, 16, 2))
    assert tiles.carpool_tile_fault() == fault
    assert tiles.carpool_tile_fault() is None


def test_tiles_out_of_turn_are_a_fault(tiles: ctypes.CDLL) -> None:
    sums = np.zeros((16, 16), np.float32)
    tiles.soft_after_release(sums.ctypes.data_as(ctypes.c_void_p))
    assert tiles.carpool_tile_fault() == b"a tile used while none are configured"
    tiles.soft_twice()
    assert tiles.carpool_tile_fault() == b"configured twice: the one before was not released"
    tiles.soft_onto_itself()
    assert tiles.carpool_tile_fault() == b"a product of tiles that do not fit each other"


# ── the real ones ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_real_instructions_are_in_what_is_built() -> None:
    built = Path(native.__file__).with_name("_native.so")
    code = subprocess.run(["objdump", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    for instruction in (
        "ldtilecfg",
        "tileloadd",
        "tileloaddt1",
        "tdpbf16ps",
        "tdpbusd",
        "tilestored",
        "tilerelease",
    ):
        assert instruction in code


@pytest.mark.parametrize(
    ("features", "saved", "refused", "has", "of_bytes"),
    [
        (0x3400000, 0x60000, 0, 1, 1),
        (0x1400000, 0x60000, 0, 1, 0),  # tiles of bfloat16 alone
        (0x3000000, 0x60000, 0, 0, 0),  # tiles without bfloat16
        (0x3400000, 0x20000, 0, -1, 0),  # the kernel does not save them
        (0x3400000, 0x60000, -1, -1, 0),  # nor lend them to this process
    ],
)
def test_tiles_are_used_where_cpu_kernel_and_process_allow(
    asking: ctypes.CDLL, features: int, saved: int, refused: int, has: int, of_bytes: int
) -> None:
    assert asking.asked(features, saved, refused) == has
    assert asking.carpool_has_amx_int8() == of_bytes


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """amx.cpp with made-up answers of the CPU and of the kernel."""
    text = soft.planted(
        soft.CPU / "amx.cpp",
        {
            "unsigned features() {": "unsigned told, lent;\nlong refused;\nunsigned features() {",
            "__get_cpuid_count(7, 0, &a, &b, &c, &d)": "(d = told, true)",
            'asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));': "saved = lent;",
            "syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)": "refused",
            "static const ": "const ",
        },
    )
    text += (
        '\nextern "C" int asked(unsigned f, unsigned s, long r) '
        "{ told = f, lent = s, refused = r; return carpool_has_amx(); }\n"
    )
    made = soft.compiled(text, tmp_path_factory.mktemp("asking") / "asking.cpp", soft=False)
    soft.link([made], made.with_suffix(".so"))
    return ctypes.CDLL(str(made.with_suffix(".so")))


# ── in parts ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_helpers_have_tiles_of_their_own_and_change_no_bit() -> None:
    query, key, value = made([300, 40], (6, 3), 48)
    runs = [(300, 1), (40, 1)]
    calls: list[Callable[[], Tensor]] = [partial(native.varlen_attention, query, key, value, runs, scale=0.2)]
    for tokens, inputs, outputs in ((14, 384, 1552), (97, 390, 48), (300, 384, 384)):
        x, panels, other = randn(tokens, inputs), layer(outputs, inputs), randn(tokens, outputs)
        norm = Norm(torch.ones(outputs), None, 1e-6, centred=True)
        calls.append(partial(native_linear.linear, x, panels, "gelu"))
        calls.append(partial(native_linear.linear_norm, x, panels, other, norm))
        if native_linear8.multiplies and inputs % 16 == 0:
            eights = Panels8.of(randn(outputs, inputs), None)
            calls.append(partial(native_linear8.linear, x, eights, "gelu"))
            calls.append(partial(native_linear8.linear_norm, x, eights, other, norm))
    alone = [call() for call in calls]
    before = crew.hire(4)
    try:
        with crew.leading():
            for _ in range(20):
                for call, expected in zip(calls, alone, strict=True):
                    assert torch.equal(call(), expected)
        assert crew.helped()
        assert_no_fault()
    finally:
        crew.hire(before)
