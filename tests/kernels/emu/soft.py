"""The AMX kernels as they are, with g++, on tiles in software (soft_tiles.h): for CPUs that have none."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from carpool.kernels import native
from emu import build

CPU = Path(native.__file__).with_name("cpu")
# The last three for the encoder alone, which calls all of them.
SOURCES = (
    *("amx.cpp", "level.cpp", "crew.cpp", "pages.cpp", "linear_amx.cpp"),
    *("attention.cpp", "attention_amx.cpp", "attention_bf16.cpp", "attention_f32.cpp"),
    *("linear8.cpp", "linear8_amx.cpp"),
    *("encoder.cpp", "linear.cpp", "rows.cpp"),
)
MISSING = next((f"needs {tool}" for tool in ("g++", "objdump") if not shutil.which(tool)), None)
if native.level < 3:
    MISSING = "no AVX-512 BF16 here, which the AMX kernels use beside tiles; or not built"
COMMON = ("g++", "-std=c++17", "-fPIC", "-w")


def library(changes: Mapping[str, Mapping[str, str]] | None = None) -> ctypes.CDLL:
    """The kernels on software tiles; `changes`: what stands in a file of theirs → what to plant in its place."""
    folder = build.folder() / f"soft-{sum(1 for _ in build.folder().glob('soft-*'))}"
    folder.mkdir()
    sources = [CPU / name for name in SOURCES] + [build.HERE / "soft_probe.cpp"]
    objects = list(
        build.PARALLEL.map(lambda path: _object(path, folder, (changes or {}).get(path.name)), sources)
    )
    linked = folder / "soft.so"
    link(objects, linked)
    loaded = ctypes.CDLL(str(linked))
    loaded.carpool_tile_fault.restype = ctypes.c_char_p
    return loaded


def _object(path: Path, folder: Path, changes: Mapping[str, str] | None) -> Path:
    if not changes:
        return _as_it_is(path)
    return compiled(planted(path, changes), folder / path.name)


@functools.cache
def _as_it_is(path: Path) -> Path:
    return compiled(path.read_text(), build.folder() / f"as-it-is-{path.name}")


def planted(path: Path, changes: Mapping[str, str]) -> str:
    text = path.read_text()
    for there, instead in changes.items():
        assert there in text, f"{path.name} has no {there!r}"
        text = text.replace(there, instead)
    return text


def compiled(text: str, unit: Path, *, soft: bool = True) -> Path:
    unit.write_text(text)
    made = unit.with_suffix(".o")
    tiles = ['-DCARPOOL_SOFT_TILES="soft_tiles.h"'] if soft else []
    _run(*COMMON, "-O1", f"-I{CPU}", f"-I{build.HERE}", *tiles, "-c", str(unit), "-o", str(made))
    return made


def link(objects: Sequence[Path], to: Path) -> None:
    _run(*COMMON, "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(to))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
