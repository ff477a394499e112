"""The native kernels compute what their torch twins do, on every instruction set that this CPU has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import native, native_linear8, ops, reference
from carpool.kernels.attention import Choice
from rows import laid_out

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
    beyond=st.one_of(st.none(), st.integers(0, 3)),
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
    beyond: int | None,
) -> None:
    """`beyond`: how much further than the longest text a bias goes; None is no bias."""
    query, key, value = make(lengths, *heads, size, dtype)
    runs = [(length, 1) for length in lengths]
    assert native.serves(query, key, value)
    how: dict[str, Any] = {"scale": size**-0.5, "causal": causal, "window": window, "softcap": softcap}
    if beyond is not None and heads[0] == heads[1]:
        how["bias"] = 3 * torch.randn(heads[0], 2 * (max(lengths) + beyond) - 1)
    exact = reference.varlen_attention(query.float(), key.float(), value.float(), runs, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", level)
        mine = native.varlen_attention(query, key, value, runs, **how)

    assert mine.dtype == dtype
    # bfloat16 keeps 8 bits: of each weight, and of the result.
    bound = 1e-5 if dtype == torch.float32 else 2 * 2**-8
    assert (mine.float() - exact).abs().max() <= bound * exact.abs().max()


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "biased"), [(None, False), (2, True), (65, False), (500, True)])
def test_long_texts_equal_their_twin_alone_and_in_company(
    level: int,
    dtype: torch.dtype,
    causal: bool,
    window: int | None,
    biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long enough that keys are copied and windowed queries go piece by piece: 384 are one, 385 one and a bit."""
    monkeypatch.setattr(native, "level", level)
    lengths = [5, 385, 1001, 384, 770]
    query, key, value = make(lengths, 4, 4 if biased else 2, 32, dtype)
    runs = [(length, 1) for length in lengths]
    how: dict[str, Any] = {"scale": 32**-0.5, "causal": causal, "window": window}
    if biased:
        how["bias"] = 3 * torch.randn(4, 2 * max(lengths) - 1)
    exact = reference.varlen_attention(query.float(), key.float(), value.float(), runs, **how)
    mine = native.varlen_attention(query, key, value, runs, **how)

    bound = 1e-5 if dtype == torch.float32 else 2 * 2**-8
    assert (mine.float() - exact).abs().max() <= bound * exact.abs().max()
    for start, end in pairwise(accumulate([0, *lengths])):
        own = [x[start:end] for x in (query, key, value)]
        alone = native.varlen_attention(own[0], own[1], own[2], [(end - start, 1)], **how)
        assert torch.equal(alone, mine[start:end])


@needs_native
@pytest.mark.parametrize("shape", [(2, 15), (2, 18), (1, 17), (2, 17, 3), (2,)])
def test_a_bias_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    query, key, value = make([5, 9], 2, 2, 32, torch.float32)
    with pytest.raises(ValueError, match="a bias"):
        native.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0, bias=torch.zeros(shape))


@needs_native
def test_what_it_cannot_take_goes_to_the_twin() -> None:
    query, key, value = make([5, 9], 2, 2, 24, torch.float32)

    assert not native.serves(query, key, value)
    out = ops.varlen_attention(query, key, value, laid_out([5, 9]), scale=1.0)
    assert torch.equal(out, reference.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0))


@needs_native
@pytest.mark.parametrize(
    ("heads", "asks"),
    [(1, {"bias": torch.ones(2, 27) * torch.arange(27)}), (2, {"sinks": torch.ones(2)})],
    ids=["a bias on heads that share their keys", "sinks"],
)
def test_what_it_knows_nothing_of_goes_to_the_twin(heads: int, asks: dict[str, Any]) -> None:
    query, key, value = make([5, 9], 2, heads, 32, torch.float32)

    assert native.serves(query, key, value)
    out = ops.varlen_attention(query, key, value, laid_out([5, 9]), scale=1.0, **asks)
    assert torch.equal(
        out, reference.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0, **asks)
    )
    assert not torch.allclose(out, native.varlen_attention(query, key, value, [(5, 1), (9, 1)], scale=1.0))


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(level: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level", level)
    query, key, value = make([33], 2, 2, 32, dtype)
    for size in (1e4, 1e7):  # scores of 10^9 and, beyond what an int32 holds, 10^15
        out = native.varlen_attention(size * query, size * key, value, [(33, 1)], scale=1.0)
        assert torch.isfinite(out).all()


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_does_not_get_lost(
    level: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "level", level)
    query, key, value = make([33, 9], 2, 2, 32, dtype)
    query[5, 0, 3] = key[40, 1, 0] = float("nan")

    out = native.varlen_attention(query, key, value, [(33, 1), (9, 1)], scale=1.0)
    lost = torch.isnan(out).any(2)
    expected = torch.zeros(42, 2, dtype=torch.bool)
    expected[5, 0] = expected[33:, 1] = True
    assert torch.equal(lost, expected)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
def test_a_window_that_no_text_fills_is_none(
    level: int, dtype: torch.dtype, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a token's place and the window are more than the kernels' integers hold."""
    monkeypatch.setattr(native, "level", level)
    query, key, value = make([33, 9], 2, 2, 32, dtype)
    runs = [(33, 1), (9, 1)]
    for causal in (False, True):
        plain = native.varlen_attention(query, key, value, runs, scale=0.2, causal=causal)
        out = native.varlen_attention(query, key, value, runs, scale=0.2, causal=causal, window=window)
        assert torch.equal(out, plain)


@needs_native
@pytest.mark.parametrize("window", [0, -1, -(2**40)])
def test_a_window_in_which_nothing_is_seen_is_refused(window: int) -> None:
    """A key's place would lie behind what is held."""
    query, key, value = make([40], 2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="at least 1"):
        native.varlen_attention(query, key, value, [(40, 1)], scale=0.2, window=window)


@needs_native
def test_tokens_that_a_tensor_lacks_are_not_read() -> None:
    query, key, value = make([5, 9], 4, 2, 16, torch.float32)
    for q, k, v in ((query[1:], key, value), (query, key[1:], value), (query, key, value[1:])):
        with pytest.raises(ValueError, match="of 14 tokens"):
            native.varlen_attention(q, k, v, [(5, 1), (9, 1)], scale=0.2)
    # heads that values lack, or that keys do not share out
    assert native.serves(query, key, value)
    assert not native.serves(query, key, value[:, :1])
    assert not native.serves(query[:, :3], key, value)
    assert not native.serves(query, key[:, :0], value[:, :0])


def test_without_the_library_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", None)
    query, key, value = make([3], 1, 1, 16, torch.float32)

    assert not native.serves(query, key, value)
    assert ops.attention_of(query, key, value, laid_out([3])) == Choice("torch", "no native kernels")
    assert ops.varlen_attention(query, key, value, laid_out([3]), scale=1.0).shape == (3, 1, 16)


@needs_native
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_lack_of_memory_is_an_exception_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    """Also in a thread that helps; and whoever asks again when there is some gets what it asked for."""
    here, library = Path(__file__).parent, tmp_path / "no_memory.so"
    source = here / "emu" / "no_memory.cpp"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "emu.no_memory", str(library)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [line.rpartition(": ") for line in done.stdout.splitlines()]
    lacked, without = "lacked memory and said so", "did without memory"
    assert {last for name, _, last in said if name.endswith("alone")} == {lacked}
    # Helpers that have what they need may come first.
    assert {last for name, _, last in said if name.endswith("with helpers")} <= {lacked, without}
    assert len(said) == (20 if native.level >= 3 else 12) - (0 if native_linear8.multiplies else 8)


# ── the library and its sources ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the library and what it was made of."""
    kernels = Path(native.__file__).parent
    shutil.copy(kernels / "_native.so", tmp_path)
    shutil.copytree(kernels / "cpu", tmp_path / "cpu")
    return tmp_path


@needs_native
def test_a_library_goes_with_its_sources(copied: Path) -> None:
    assert native.load(copied) is not None


@needs_native
def test_one_of_other_sources_is_not_called(copied: Path) -> None:
    """As after an upgrade of a checkout, which leaves the library where it was."""
    source = copied / "cpu" / "linear.h"
    source.write_text(source.read_text() + "// changed\n")
    assert native.load(copied) is None


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_neither_is_one_that_does_not_know_its_sources(tmp_path: Path) -> None:
    library = tmp_path / "_native.so"
    code = b"int carpool_cpu_level() { return 1; }"
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", str(library)], input=code, check=True)
    assert native.load(tmp_path) is None
    library.unlink()
    assert native.load(tmp_path) is None
    library.write_bytes(b"of another machine")
    assert native.load(tmp_path) is None
