"""Idle cores help with a call: each part is computed once, whoever takes it, and results are the same to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import crew, native, native_linear, native_linear8
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import Norm

CPU = Path(native.__file__).with_name("cpu")
WATCH = Path(__file__).with_name("emu") / "crew_watch.cpp"
CORES = 4
few = settings(max_examples=15, deadline=None)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])

needs_native = pytest.mark.skipif(native.library is None, reason="the native kernels are not built")
needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


# ── the crew itself ──────────────────────────────────────────────────────────────────────────────────────────


def watched(folder: Path, *options: str, change: tuple[str, str] | None = None) -> Path:
    """crew_watch over crew.cpp; `change`: what stands there → what to plant in its place."""
    text = (CPU / "crew.cpp").read_text()
    if change:
        assert text.count(change[0]) == 1
        text = text.replace(*change)
    (folder / "crew.cpp").write_text(text)
    made = folder / "watch"
    sources = [str(folder / "crew.cpp"), str(WATCH)]
    command = ["g++", "-O1", "-g1", "-std=c++17", "-w", "-pthread", f"-I{CPU}", *options, *sources]
    subprocess.run([*command, "-o", str(made)], check=True)
    return made


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)


def has_thread_sanitizer() -> bool:
    if not shutil.which("g++"):
        return False
    asked = ["g++", "-print-file-name=libtsan.so"]
    return os.path.isabs(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())


@needs_gcc
def test_it_helps_makes_way_rests_and_outlives_a_fork(tmp_path: Path) -> None:
    done = run(watched(tmp_path))
    assert (done.returncode, done.stdout) == (0, "ran clean\n"), done.stderr


@pytest.mark.skipif(not has_thread_sanitizer(), reason="needs g++ with libtsan")
def test_no_two_threads_race(tmp_path: Path) -> None:
    done = run(watched(tmp_path, "-fsanitize=thread"), "without fork")
    assert (done.returncode, done.stdout) == (0, "ran clean\n"), done.stderr[-4000:]


FAULTS = {
    "who does not wait for helpers": ("if (desk->inside.load()) wait_for", "if (false) wait_for"),
    "a part taken twice": ("const int i = desk.next.fetch_add(1);", "const int i = desk.next.load();"),
    "a crew that does not rest": ("crew.rests_until =", "Clock::duration planted ="),
    "a helper that dies of a lack of memory": ("catch (const std::bad_alloc&)", "catch (const char*)"),
    "a lack of memory that nobody hears of": ("if (lacked) throw std::bad_alloc();", ""),
    "a lack of memory that outlives its call": (", desk->lacked.store(false)", ""),
}


@needs_gcc
@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_it_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    done = run(watched(tmp_path, change=change))
    assert done.stdout != "ran clean\n"


# ── kernels with it ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", autouse=True)
def hired() -> Iterator[None]:
    before = crew.hire(CORES)
    yield
    crew.hire(before)


def alone_and_shared(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    alone = call()
    with crew.leading():
        return alone, call()


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
@given(
    dtype=dtypes,
    tokens=st.one_of(st.integers(1, 40), st.sampled_from([97, 300, 901])),
    inputs=st.sampled_from([64, 384, 1536]),
    outputs=st.sampled_from([48, 384, 1552]),
    activation=st.sampled_from([None, "gelu", "silu"]),
    eight_bits=st.booleans(),
)
@few
def test_a_linear_layer_is_the_same_to_the_bit(
    dtype: torch.dtype,
    tokens: int,
    inputs: int,
    outputs: int,
    activation: Activation | None,
    eight_bits: bool,
) -> None:
    x, bias = randn(tokens, inputs, dtype=dtype), randn(outputs, dtype=dtype)
    weight = randn(outputs, inputs, dtype=dtype) * inputs**-0.5
    if eight_bits:
        if not native_linear8.multiplies:
            return
        layer8 = Panels8.of(weight, bias)
        alone, shared = alone_and_shared(lambda: native_linear8.linear(x, layer8, activation))
    else:
        layer = Panels.of(weight, bias)
        alone, shared = alone_and_shared(lambda: native_linear.linear(x, layer, activation))
    assert torch.equal(alone, shared)


@pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
@given(
    dtype=dtypes,
    tokens=st.sampled_from([1, 14, 97, 901]),
    eight_bits=st.booleans(),
    residual=st.booleans(),
    normed=st.booleans(),
)
@few
def test_so_is_one_with_a_residual_and_norm(
    dtype: torch.dtype, tokens: int, eight_bits: bool, residual: bool, normed: bool
) -> None:
    inputs, outputs = 1536, 384
    x, bias = randn(tokens, inputs, dtype=dtype), randn(outputs, dtype=dtype)
    weight = randn(outputs, inputs, dtype=dtype) * inputs**-0.5
    # Wider rows than it reads: the next token's begins somewhere behind.
    other = randn(tokens, outputs + 16, dtype=dtype)[:, :outputs] if residual else None
    norm = Norm(randn(outputs, dtype=torch.float32), None, 1e-6, centred=True) if normed else None
    if eight_bits:
        if not native_linear8.multiplies:
            return
        layer8 = Panels8.of(weight, bias)
        alone, shared = alone_and_shared(lambda: native_linear8.linear_norm(x, layer8, other, norm))
    else:
        layer = Panels.of(weight, bias)
        alone, shared = alone_and_shared(lambda: native_linear.linear_norm(x, layer, other, norm))
    assert torch.equal(alone, shared)


@needs_native
@given(
    dtype=dtypes,
    lengths=st.lists(st.sampled_from([1, 9, 64, 300]), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (6, 2), (12, 12), (14, 7)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 33]),
)
@few
def test_so_is_attention(
    dtype: torch.dtype, lengths: list[int], heads: tuple[int, int], causal: bool, window: int | None
) -> None:
    row = randn(sum(lengths), heads[0] + 2 * heads[1], 64, dtype=dtype)
    query, key, value = row.split([heads[0], heads[1], heads[1]], dim=1)  # type: ignore[no-untyped-call]
    runs = [(length, 1) for length in lengths]
    how: dict[str, Any] = {"scale": 0.125, "causal": causal, "window": window}
    if heads[0] == heads[1]:
        how["bias"] = randn(heads[0], 2 * max(lengths) - 1, dtype=torch.float32)
    alone, shared = alone_and_shared(lambda: native.varlen_attention(query, key, value, runs, **how))
    assert torch.equal(alone, shared)


@needs_native
def test_helpers_do_take_part_and_only_in_what_a_batch_leads() -> None:
    row = randn(2048, 36, 64, dtype=torch.float32)
    query, key, value = row.split([12, 12, 12], dim=1)  # type: ignore[no-untyped-call]

    def call() -> Tensor:
        return native.varlen_attention(query, key, value, [(2048, 1)], scale=0.125)

    before = crew.helped()
    call()
    assert crew.helped() == before
    with crew.leading():
        for _ in range(100):
            call()
            if crew.helped() > before:
                return
    pytest.fail("nobody helped in a hundred calls")
