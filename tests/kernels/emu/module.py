"""Kernels that were built for the emulator, launched with torch's tensors as CuPy would launch them with pointers."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emu import build

FORWARD, REVERSE, RANDOM = 0, 1, 2
_RED_ZONE = 512  # bytes either side of a guarded argument
# The runtime has one state a library, and the process one table of libraries.
_running = threading.Lock()


class KernelError(RuntimeError):
    """What the emulator found wrong with a kernel or with how it was launched."""


@dataclass(frozen=True)
class Fresh:
    """An output as `torch.empty` gives it. The kernel may read nothing of it unwritten, and must write all of it."""

    tensor: Tensor
    whole: bool = True  # False: what the kernel leaves is not its to write


Argument = Tensor | Fresh | np.generic | None


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared", "order")),
        ("seed", ctypes.c_uint64),
        ("preempt", ctypes.c_uint),
    ]


class Module:
    """A library of kernels. signatures: of those whose own says too little (PTX knows no element types)."""

    def __init__(self, path: Path, check: bool, signatures: Mapping[str, str] | None = None) -> None:
        self.path, self.check, self.signatures = path, check, signatures or {}
        self._library = ctypes.CDLL(str(path))
        self._library.emu_error.restype = ctypes.c_char_p
        if check:
            self._library.emu_first_unwritten.restype = ctypes.c_long
            for offset, size in _shared_arrays(path):
                self._library.emu_add_array(ctypes.c_size_t(offset), ctypes.c_size_t(size))

    @classmethod
    def compile(cls, source: str, exports: dict[str, str], *, check: bool) -> Module:
        return cls(build.library(source, exports, check=check), check)

    def signature(self, name: str) -> str:
        """Three letters an argument: kind (P, C, I, F) and bytes, of the element for a pointer."""
        describe = getattr(self._library, f"{name}_signature")
        describe.restype = ctypes.c_char_p
        return str(describe().decode())

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Argument],
        *,
        shared: int = 0,
        order: int = RANDOM,
        seed: int = 0,
        preempt: int = 0,
        shift: int = 0,
    ) -> None:
        """Runs all blocks. shared: bytes of dynamic shared memory. order, seed: whose turn it is.

        preempt: in check mode, the turn ends at one memory access in so many. shift: in check mode, bytes by which
        each tensor starts after a multiple of 256.
        """
        kinds = re.findall("...", self.signatures.get(name) or self.signature(name))
        if len(kinds) != len(arguments):
            raise KernelError(f"{name} takes {len(kinds)} arguments, not {len(arguments)}")
        with _running:
            cells = []
            back: list[tuple[int, Tensor, Tensor, bool]] = []
            try:
                for i, (kind, argument) in enumerate(zip(kinds, arguments, strict=True)):
                    cells.append(self._cell(name, i, kind, argument, shift, back))
                pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
                sizes = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
                config = _Config(*sizes, shared, order, seed % 2**63, preempt)
                if getattr(self._library, name)(ctypes.byref(config), pointers):
                    raise KernelError(self._placed(self._library.emu_error().decode(errors="replace")))
                for i, _, _, whole in back:
                    if whole and (byte := self._library.emu_first_unwritten(i)) >= 0:
                        raise KernelError(f"{name}: byte {byte} of argument {i} was never written")
            finally:
                if self.check:
                    self._library.emu_forget_buffers()
                for _, tensor, copy, _ in back:
                    tensor.copy_(copy)

    def _cell(
        self,
        name: str,
        i: int,
        kind: str,
        argument: Argument,
        shift: int,
        back: list[tuple[int, Tensor, Tensor, bool]],
    ) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
        """The value of an argument, in memory of its own: a number, or an address."""
        size = int(kind[1:])
        if kind[0] in "IF":
            number = "f" if kind[0] == "F" else "iub"
            if not isinstance(argument, np.generic):
                raise KernelError(
                    f"{name}: argument {i} must be a numpy scalar: a bare number has its own width"
                )
            if argument.dtype.itemsize != size or argument.dtype.kind not in number:
                raise KernelError(f"{name}: argument {i} is {argument.dtype}, the kernel takes {kind}")
            return np.array([argument])
        if argument is None:
            return np.array([0], np.uint64)
        if not isinstance(argument, Tensor | Fresh):
            raise KernelError(f"{name}: argument {i} must be a tensor")
        fresh = isinstance(argument, Fresh)
        tensor = argument.tensor if isinstance(argument, Fresh) else argument
        if tensor.element_size() != size and size != 16:  # 16: a vector of any elements
            raise KernelError(
                f"{name}: argument {i} is {tensor.dtype}, the kernel takes {size} bytes an element"
            )
        if fresh and not tensor.is_contiguous():
            raise KernelError(f"{name}: argument {i} is an output with gaps")
        if not self.check:
            return np.array([tensor.data_ptr()], np.uint64)
        # A copy to the byte, with nothing near it; a view lies as far behind a multiple of 256 as it would on a device.
        gaps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((1 + gaps if tensor.numel() else 0,), (1,)).view(torch.uint8)
        bytes_ = len(flat)
        shift += int(tensor.storage_offset()) * tensor.element_size() % 256
        raw = torch.full((bytes_ + 2 * _RED_ZONE + 256,), 0xA5, dtype=torch.uint8)
        start = -raw.data_ptr() % 256 + _RED_ZONE + shift
        address = raw.data_ptr() + start
        copy = raw[start : start + bytes_]
        copy.copy_(flat)
        if fresh:
            copy.fill_(0xFF)  # NaN, and -1: what is read of it later, unwritten, is plainly wrong
        self._library.emu_add_buffer(
            ctypes.c_void_p(address), ctypes.c_size_t(bytes_), int(kind[0] == "C"), int(fresh), i
        )
        whole = isinstance(argument, Fresh) and argument.whole
        # A const argument comes back too: it keeps the copy alive, and is as it was.
        back.append((i, flat, copy, whole))
        return np.array([address], np.uint64)

    def _placed(self, message: str) -> str:
        """The message with addresses replaced by places in the source, innermost first."""

        def place(match: re.Match[str]) -> str:
            command = ["addr2line", "-e", str(self.path), "-i", "-s", match[1]]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
            names = [line.split(" ")[0] for line in lines if line and not line.startswith(("shim.h", "?"))]
            return " < ".join(names) or match[0]

        return re.sub(r"<\+(0x[0-9a-f]+)>", place, message)


def _shared_arrays(path: Path) -> list[tuple[int, int]]:
    """Offset and bytes of each __shared__ array, from the library's table of symbols."""
    command = ["readelf", "--syms", "--wide", str(path)]
    rows = [
        line.split()
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    found = {
        (int(row[1], 16), int(row[2], 0))
        for row in rows
        if len(row) > 7 and row[3] == "TLS" and row[6] != "UND" and row[7] != "emu_dynamic"
    }
    return sorted(found)
