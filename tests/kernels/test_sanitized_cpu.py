"""The native CPU kernels touch only memory that is theirs, and do nothing undefined: watched by gcc's sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import carpool.kernels
from carpool.kernels import native

SOURCES = sorted((Path(carpool.kernels.__file__).parent / "cpu").glob("*.cpp"))
OPTIONS = [
    "-O1", "-g1", "-std=c++17", "-Wno-psabi", "-w", "-fPIC",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
    "-fno-sanitize=object-size,pointer-overflow",  # half of the compiler's time; address finds what they would
]  # fmt: skip


def runtimes() -> list[str]:
    """Of the sanitizers, to be loaded before anything else; none where gcc has not got them."""
    if not shutil.which("g++"):
        return []
    names = ("libasan.so", "libubsan.so")
    asked = (["g++", f"-print-file-name={name}"] for name in names)
    paths = [subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() for ask in asked]
    return paths if all(os.path.isabs(path) for path in paths) else []


pytestmark = [
    pytest.mark.skipif(native.library is None, reason="the native kernels are not built"),
    pytest.mark.skipif(not runtimes(), reason="needs g++ with libasan and libubsan"),
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run(["g++", *OPTIONS, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    library = folder / "watched.so"
    subprocess.run(["g++", *OPTIONS, "-shared", *objects, "-o", str(library)], check=True)
    return library


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The kernels in a process of their own. Python and torch leak by their own lights: that is not looked at."""
    surroundings = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-m", "emu.sanitized_cpu", str(library), *arguments]
    return subprocess.run(command, env=surroundings, capture_output=True, text=True)


def test_every_kernel_runs_clean(watched: Path) -> None:
    done = run(watched)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ran clean" in done.stdout


def test_a_kernel_that_is_told_of_too_many_rows_is_caught(watched: Path) -> None:
    done = run(watched, "--fault")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "norm_rows" in done.stderr
