"""Peaks: what this CPU can do at most, measured when it is asked, by a small C++ program (peaks.cpp).

python benchmarks/peaks.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

from report import circumstances, cores, facts, table

SOURCE = Path(__file__).resolve().with_name("peaks.cpp")
UNITS = {
    "fma": "float32 multiply-add, GFLOP/s",
    "vdpbf16ps": "AVX-512 BF16 dot products, GFLOP/s",
    "amx_bf16": "AMX bfloat16 tiles loaded from L1, GFLOP/s",
    "vpdpbusd": "AVX-512 VNNI dot products of bytes, GOP/s",
    "amx_int8": "AMX int8 tiles loaded from L1, GOP/s",
    "copy": "bytes read and written by copying 1 MiB, GB/s",
}
# Which of them bound a product of this dtype: the fastest that there is.
OF_DTYPE: Mapping[str, tuple[str, ...]] = {
    "float32": ("fma",),
    "bfloat16": ("amx_bf16", "vdpbf16ps", "fma"),
    "int8": ("amx_int8", "vpdpbusd", "fma"),
}
_UNSUPPORTED = 3  # peaks.cpp's status where the CPU lacks the instructions


@dataclass(frozen=True, slots=True)
class Peaks:
    """10^9 a second by kind: of one core while the others idle, and of all at once. `why` there are none, if so."""

    one: Mapping[str, float]
    all: Mapping[str, float]
    why: str = ""

    def of(self, dtype: str) -> str | None:
        """The kind that bounds products of this dtype; None if nothing was measured."""
        kinds = [kind for kind in OF_DTYPE[dtype] if kind in self.one]
        return max(kinds, key=self.one.__getitem__, default=None)

    def fraction(self, dtype: str, rate: float, *, everywhere: bool = False) -> str:
        """`rate`, in 10^9 a second, as percent of the peak of one core or of all of them."""
        kind = self.of(dtype)
        peak = (self.all if everywhere else self.one).get(kind or "")
        return f"{100 * rate / peak:.0f} %" if peak else ""

    def or_higher(self, other: Peaks) -> Peaks:
        """The higher of both, kind by kind: a core's clock moves, and what was measured is no peak if it did better."""
        return Peaks(_higher(self.one, other.one), _higher(self.all, other.all), self.why)

    def text(self) -> str:
        """A Markdown table, or why there is none."""
        if self.why:
            return f"No peaks: {self.why}"
        rows = [
            (UNITS[kind], f"{rate:,.0f}", f"{self.all.get(kind, 0.0):,.0f}")
            for kind, rate in self.one.items()
        ]
        return table(("measured peak", "one core", f"all {cores()} cores"), rows)


def _higher(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {kind: max(rate, other.get(kind, rate)) for kind, rate in one.items()}


def measure() -> Peaks:
    """Takes about a second a kind. Never raises for what a machine lacks."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return Peaks(
            {}, {}, "there is no C++ compiler to build benchmarks/peaks.cpp with (c++, g++, clang++)."
        )
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        command = [compiler, "-O2", "-std=c++17", str(SOURCE), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            return Peaks(
                {}, {}, f"{compiler} does not build benchmarks/peaks.cpp: {built.stderr.strip()[:300]}"
            )
        one = {kind: rate for kind in UNITS if (rate := _rate(program, kind, 1)) is not None}
        everywhere = {kind: rate for kind in one if (rate := _rate(program, kind, cores())) is not None}
    return Peaks(one, everywhere)


def _rate(program: Path, kind: str, count: int) -> float | None:
    """The sum of `count` processes at once; None where the CPU cannot."""
    command = [str(program), kind]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode == _UNSUPPORTED for process in running):
        return None
    return sum(map(float, printed))


if __name__ == "__main__":
    print(facts(circumstances()), measure().text(), sep="\n\n")
