"""Libraries from CUDA C or translated PTX with g++, kept per content for as long as the tests run."""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
_TOOLS = ("g++", "addr2line", "c++filt", "readelf")
MISSING = next((f"needs {tool}" for tool in _TOOLS if not shutil.which(tool)), None)
if platform.machine() != "x86_64":
    MISSING = "fibers are switched in x86-64's assembly"

# `-fno-gnu-unique`: else the shared arrays of templates would be one in all libraries of the process.
# `-fno-extern-tls-init`: else a call of a wrapper that only C++ initialisers would bring.
COMMON = [
    "g++", "-std=c++17", "-fPIC", "-march=native", "-fno-gnu-unique", "-fno-extern-tls-init",
    "-fno-strict-aliasing", "-w", f"-I{HERE}",
]  # fmt: skip
FAST = ["-O1", "-ffp-contract=fast"]
# Every load and store as it stands in the source: none widened, none merged.
CHECK = [
    "-O1", "-g", "-ffp-contract=fast", "-fno-tree-vectorize", "-fno-store-merging", "-DEMU_CHECK",
    "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
]  # fmt: skip
PARALLEL = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="g++")
_locks: dict[Path, threading.Lock] = {}


@functools.cache
def folder() -> Path:
    """Where this process keeps what it builds; gone when it ends."""
    path = Path(tempfile.mkdtemp(prefix="carpool-emulator-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def library(source: str, exports: dict[str, str], *, check: bool, exact: bool = False) -> Path:
    """A shared library that has each of `exports`: name → the kernel, with its template arguments.

    check: with the checker in it. exact: no multiply and add are fused but those that the source fuses (PTX).
    """
    dynamic = dict.fromkeys(re.findall(r"extern\s+__shared__[^;]*?(\w+)\s*\[\s*\]", source))
    lines = [f"#define {name} emu_dynamic" for name in dynamic if name != "emu_dynamic"]
    lines += ['#include "shim.h"', '#line 1 "kernels.cu"', source, '#line 1 "exports"']
    lines += [f"EMU_EXPORT({name}, {kernel})" for name, kernel in exports.items()]
    options = [*(CHECK if check else FAST), *(["-ffp-contract=off"] if exact else [])]
    text = "\n".join(lines) + "\n"
    key = hashlib.sha256(repr((text, options)).encode()).hexdigest()[:20]
    path = folder() / f"{key}.so"
    with _locks.setdefault(path, threading.Lock()):
        if not path.exists():
            unit, object_file = path.with_suffix(".cpp"), path.with_suffix(".o")
            unit.write_text(text)
            _run([*COMMON, *options, "-c", str(unit), "-o", str(object_file)])
            linked = path.with_suffix(".linking")
            objects = [str(object_file), *map(str, runtime(check))]
            _run([*COMMON, "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(linked)])
            linked.rename(path)
    return path


def runtime(check: bool) -> list[Path]:
    """The objects that every library is linked with."""
    objects = []
    for name in ("runtime", "checker") if check else ("runtime",):
        path = folder() / f"{name}-{check}.o"
        with _locks.setdefault(path, threading.Lock()):
            if not path.exists():
                options = ["-O2", "-g", *(["-DEMU_CHECK"] if check else [])]
                _run([*COMMON, *options, "-c", str(HERE / f"{name}.cpp"), "-o", str(path)])
        objects.append(path)
    return objects


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
