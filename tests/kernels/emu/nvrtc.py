"""NVRTC without a GPU: CUDA C to PTX with the options that CuPy compiles with."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from collections.abc import Iterable

from emu import build
from emu.module import Module
from emu.translate import translate

WHEELS = ("cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12")


def _installed(wheel: str) -> bool:
    try:
        return bool(importlib.metadata.version(wheel))
    except importlib.metadata.PackageNotFoundError:
        return False


MISSING = next((f"needs {wheel}" for wheel in WHEELS if not _installed(wheel)), None)
_SIZES = {
    "signed char": 1, "unsigned char": 1, "char": 1, "bool": 1, "__half": 2, "__nv_bfloat16": 2, "short": 2,
    "unsigned short": 2, "int": 4, "unsigned int": 4, "float": 4, "long": 8, "unsigned long": 8, "long long": 8,
    "unsigned long long": 8, "double": 8, "uint4": 16, "float4": 16, "int4": 16, "uint2": 8, "float2": 8, "int2": 8,
}  # fmt: skip


def ptx(source: str, kernels: Iterable[str], arch: int) -> tuple[str, dict[str, str]]:
    """The PTX of some kernels for `compute_<arch>`, and the name there of each."""
    from cupy._core import core
    from cupy.cuda import compiler

    program = compiler._NVRTCProgram(source, "kernels.cu", name_expressions=list(kernels), method="ptx")
    options = core.assemble_cupy_compiler_options(())
    options += ("-ftz=true", f"-arch=compute_{arch}", "--device-as-default-execution-space", "-lineinfo")
    text, names = program.compile(options)
    return text.decode() if isinstance(text, bytes) else text, dict(names)


def module(source: str, exports: dict[str, str], arch: int, *, check: bool) -> Module:
    """The compiler's output on the emulator: exports are name → kernel, with its template arguments."""
    text, names = ptx(source, dict.fromkeys(exports.values()), arch)
    translated, _ = translate(text)
    renamed = {name: f"{names[kernel]}_ptx" for name, kernel in exports.items()}
    path = build.library(translated, renamed, check=check, exact=True)
    return Module(path, check, {name: signature(names[kernel]) for name, kernel in exports.items()})


def signature(mangled: str) -> str:
    """What `Module.signature` says of a kernel, read from its mangled name: PTX has lost what pointers point to."""
    demangled = subprocess.run(
        ["c++filt", mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
    match = re.fullmatch(r"(?:void )?[\w:]+(?:<.*>)?\((.*)\)", demangled)
    assert match, demangled
    out = ""
    for argument in filter(None, (part.strip() for part in match[1].split(","))):
        base = re.sub(r"\bconst\b|\*|__restrict(?:__)?", "", argument).strip()
        kind = "F" if base in {"float", "double"} else "I"
        if "*" in argument:
            kind = "C" if "const" in argument else "P"
        out += f"{kind}{_SIZES[base]:02d}"
    return out
