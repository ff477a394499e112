"""The CUDA kernels compile, for every architecture that is served, within their budgets. No device is needed, or used.

NVRTC makes machine code with the options that CuPy gives it; what ptxas reports of registers, spills and shared memory
is held against kernels/cuda_table.py. All types on three architectures, the oldest, the commonest and the newest; every
kernel for one of its types on the others between them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest

from carpool.kernels import cuda_table, launch
from carpool.kernels.cuda_table import BYTES, KERNELS, Instance, Kernel

IN_FULL = (75, 90, 120)
IN_PART = (80, 86, 89, 100, 103)
SMALLEST_SHARED = 48 << 10  # bytes that a block has on any architecture without asking
REGISTERS = 65536  # of a multiprocessor, on all of these architectures


def _missing() -> str | None:
    for module, package in (
        ("cupy", "cupy-cuda12x"),
        ("nvidia.cuda_nvrtc", "nvidia-cuda-nvrtc-cu12"),
        ("nvidia.cuda_runtime", "nvidia-cuda-runtime-cu12"),
    ):
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # not even the folder that it would be in
            found = None
        if found is None:
            return f"{package} is not installed, which compiles CUDA"
    return None


MISSING = _missing()
needs_nvrtc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


class Used(NamedTuple):
    """By one kernel, as ptxas reports it; bytes but for `registers`."""

    registers: int
    spilled: int
    stack: int
    shared: int


def compiled(source: str, instances: Iterable[Instance], architecture: int) -> dict[str, Used]:
    """By the name in C++. Raises what NVRTC says if it does not compile."""
    from cupy._core import core
    from cupy.cuda import compiler

    names = [instance.expression for instance in instances]
    # As CuPy compiles for a device, which it would ask for if it were called from higher up.
    options = (
        *core.assemble_cupy_compiler_options(launch.OPTIONS),
        "-ftz=true",
        "--device-as-default-execution-space",
        f"-arch=sm_{architecture}",
        "--ptxas-options=-v",
    )
    log = io.StringIO()
    program: Any = compiler._NVRTCProgram(source, "carpool.cu", name_expressions=names, method="cubin")
    code, mangled = program.compile(options, log)
    assert code
    said = reported(log.getvalue())
    return {name: said[mangled.get(name, name)] for name in names}


def reported(log: str) -> dict[str, Used]:
    """Out of what ptxas prints, by the mangled name."""
    found: dict[str, Used] = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name, _, rest = part.partition("'")

        def number(pattern: str, rest: str = rest) -> int:
            [value, *_] = re.findall(pattern, rest) or ["0"]
            return int(value)

        found[name] = Used(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes smem"),
        )
    return found


def one_each() -> list[Instance]:
    """Of every kernel the first of its types that reads bfloat16, or the only one."""
    return [
        next((each for each in kernel.instances if "__nv_bfloat16" in each.types[:1]), kernel.instances[0])
        for kernel in KERNELS
    ]


@pytest.fixture(scope="module")
def builds() -> Iterable[dict[int, Future[dict[str, Used]]]]:
    """All of them under way, two at a time: NVRTC lets other threads run."""
    with ThreadPoolExecutor(2) as pool:
        source = cuda_table.source()
        wanted = {each: list(cuda_table.instances()) for each in IN_FULL} | {
            each: one_each() for each in IN_PART
        }
        yield {
            architecture: pool.submit(compiled, source, instances, architecture)
            for architecture, instances in wanted.items()
        }


@needs_nvrtc
@pytest.mark.parametrize("architecture", [*IN_FULL, *IN_PART])
def test_every_kernel_compiles_within_its_budget(
    builds: dict[int, Future[dict[str, Used]]], architecture: int
) -> None:
    used = builds[architecture].result()
    assert {name.split("<")[0] for name in used} == {kernel.name for kernel in KERNELS}
    for name, of in used.items():
        kernel = cuda_table.BY_NAME[name.split("<")[0]]
        assert 0 < of.registers <= kernel.registers, f"{name}: {of}"
        assert of.spilled == of.stack == 0, f"{name}: {of}"
        # Arrays are laid out at multiples of 16 bytes.
        assert kernel.shared <= of.shared <= kernel.shared + 48 if kernel.shared else of.shared == 0, (
            f"{name}: {of}"
        )
        assert of.shared <= SMALLEST_SHARED


@needs_nvrtc
def test_a_mistake_in_the_source_is_an_error_that_names_its_file() -> None:
    broken = cuda_table.source() + '#line 7 "pool.cu"\n__global__ void f() { x; }'
    with pytest.raises(Exception, match=r"pool\.cu\(7\): error"):
        compiled(broken, one_each()[:1], 90)


@needs_nvrtc
def test_what_spills_is_seen() -> None:
    """The budget's own test: a thread that keeps 300 numbers has no registers for them, and says so."""
    source = (
        "__global__ void __launch_bounds__(1024) f(float* p, int n) { float v[300]; for (int i = 0; i < 300; ++i) "
        "v[i] = p[i]; for (int k = 0; k < n; ++k) for (int i = 0; i < 300; ++i) v[i] += v[(i * 7 + 1) % 300] * p[k]; "
        "for (int i = 0; i < 300; ++i) p[i] = v[i]; }"
    )
    used = compiled(source, [Instance(Kernel("f", "f.cu", "float* p, int n", 1024, 64), ())], 90)["f"]
    assert used.stack + used.spilled > 0


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────

_GLOBAL = re.compile(
    r"(?:template <([^>]*)>\s*)?__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)"
)


def written() -> dict[str, tuple[str, tuple[str, ...], str]]:
    """In the sources: each kernel's file, template letters and parameters."""
    found = {}
    for path in sorted(cuda_table.FOLDER.glob("*.cu*")):
        for letters, name, takes in _GLOBAL.findall(path.read_text(encoding="utf-8")):
            plain = re.sub(r"\s+", " ", takes.replace("__restrict__ ", ""))
            assert name not in found
            found[name] = (
                path.name,
                tuple(letter.split()[-1] for letter in letters.split(", ") if letter),
                plain,
            )
    return found


def test_the_table_says_what_the_sources_do() -> None:
    table = {kernel.name: (kernel.file, kernel.letters, kernel.takes) for kernel in KERNELS}
    assert table == written()


def test_every_pointer_that_is_not_written_is_const_and_none_is_aliased() -> None:
    """`__restrict__` throughout: only then may loads be hoisted over stores, and be read through the texture cache."""
    for path in cuda_table.FOLDER.glob("*.cu"):
        for _, name, takes in _GLOBAL.findall(path.read_text(encoding="utf-8")):
            assert takes.count("*") == takes.count("* __restrict__"), name


def test_numbers_that_source_and_table_share_are_the_same() -> None:
    text = cuda_table.source()
    for name in ("CHUNK", "MOST_LANES"):
        [value] = re.findall(rf"#define {name} (\d+)", text)
        assert int(value) == getattr(cuda_table, name)


def test_attention_has_the_tiles_that_its_grid_is_made_for() -> None:
    text = cuda_table.source()
    [rule] = re.findall(r"ROWS = W > (\d+) \? 2 : 4;.*\n.*QUERIES = 16 \* ROWS;", text)
    tiles = {width: 32 if width > int(rule) else 64 for width in (64, 128, 256)}
    assert tiles == cuda_table.ATTENTION
    assert {int(width) for _, width in cuda_table.BY_NAME["attention"].types} == set(cuda_table.ATTENTION)


def test_all_files_are_in_the_one_source_the_shared_one_first() -> None:
    names = re.findall(r'^#line 1 "(.+)"$', cuda_table.source(), re.MULTILINE)
    assert names[0] == cuda_table.PRELUDE
    assert sorted(names) == sorted(path.name for path in cuda_table.FOLDER.iterdir())
    # CuPy's cache of compiled kernels would not see a change in an included file.
    assert set(re.findall(r"#include (.+)", cuda_table.source())) == {"<cuda_bf16.h>", "<cuda_fp16.h>"}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_blocks_are_whole_warps_and_fill_a_multiprocessor(kernel: Kernel) -> None:
    assert kernel.threads % 32 == 0
    assert 32 <= kernel.threads <= 1024
    # Registers are dealt to warps eight a thread at a time. Three quarters of the 1024 threads that Turing can hold
    # hide the memory's latency; attention, which multiplies out of registers, gets by with half.
    threads = 512 if kernel.name == "attention" else 768
    assert -(-kernel.registers // 8) * 8 * threads <= REGISTERS
    for instance in kernel.instances:
        assert all(parameter.element in BYTES for parameter in instance.parameters)
