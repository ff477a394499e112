"""Report: where and with what something was measured, and its numbers as Markdown."""

from __future__ import annotations

import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
QUIET_CORES = 0.1  # that other work may keep busy before the numbers are not worth quoting
_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2")  # of the CPU, as the kernel names them


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        return cls(values[0], median(values), values[-1])

    def text(self, digits: int = 0) -> str:
        """Least, median, most."""
        return " – ".join(f"{value:,.{digits}f}" for value in (self.least, self.median, self.most))


def quantile(values: Iterable[float], share: float) -> float:
    """The least value that `share` of them do not exceed."""
    values = sorted(values)
    return values[max(0, math.ceil(share * len(values)) - 1)]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def circumstances() -> dict[str, str]:
    """The machine, the commit, the command and the day."""
    cpu = _cpu_info()
    flags = cpu.get("flags", "").split()
    known = ", ".join(flag + ("" if flag in flags else ": no") for flag in _FLAGS)
    return {
        "machine": f"{cpu.get('model name', platform.machine())}, {cores()} cores ({known})",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load": f"{os.getloadavg()[0]:.2f} processes wanted a core in the minute before",
        "commit": _commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _cpu_info() -> dict[str, str]:
    """Of the first core."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str:
    """The commit's short name; says so if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty= with local changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not in a git checkout"


def facts(pairs: dict[str, str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {name}: {value}" for name, value in pairs.items())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; short rows are filled with nothing."""
    lines = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def noise_warning(cores_busy_elsewhere: float) -> list[str]:
    """A paragraph, or nothing."""
    if cores_busy_elsewhere <= QUIET_CORES:
        return []
    return [f"**Not to be quoted**: other work kept {cores_busy_elsewhere:.2f} cores busy meanwhile."]
