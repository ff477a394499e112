"""Launching CUDA kernels: what a launch is, and CuPy, which compiles and starts it on torch's current stream.

CuPy is imported when the first kernel is launched, never before: without it the torch twins serve. Nothing here has
run on a device yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from carpool.kernels import cuda_table
from carpool.kernels.cuda_table import Instance, Kernel, Parameter

ELEMENTS: Mapping[torch.dtype, str] = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
    torch.bool: "bool",
    torch.int32: "int",
    torch.int64: "i64",
}
_SCALARS: Mapping[str, type[np.generic]] = {"int": np.int32, "i64": np.int64, "float": np.float32}
OPTIONS = ("-std=c++17", "-lineinfo")  # NVRTC's, besides those that CuPy gives it
_PLAIN_SHARED = 48 << 10  # bytes of shared memory that a block gets without asking
_MOST_BLOCKS = (1 << 31) - 1, 65535, 65535  # a grid's limits

Argument = Tensor | int | float | None


class LaunchError(ValueError):
    """Arguments that a kernel cannot take: had it been launched, it would have read or written where it must not."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, ready to go: `grid` blocks of `threads`, `shared` bytes of dynamic shared memory."""

    instance: Instance
    grid: tuple[int, ...]
    threads: int
    shared: int
    arguments: tuple[Argument, ...]

    def __post_init__(self) -> None:
        parameters, name = self.instance.parameters, self.instance.expression
        if len(parameters) != len(self.arguments):
            raise LaunchError(f"{name} takes {len(parameters)} arguments, got {len(self.arguments)}")
        for parameter, argument in zip(parameters, self.arguments, strict=True):
            _check(name, parameter, argument)
        if not all(0 < size <= most for size, most in zip(self.grid, _MOST_BLOCKS, strict=False)):
            raise LaunchError(f"{name} cannot be launched on a grid of {self.grid}")

    @property
    def packed(self) -> tuple[np.generic, ...]:
        """The arguments in the exact width that the kernel takes them in.

        CuPy would make 8 bytes of a bare int and of a bare float, and the kernel would read what lies there. Tensors go
        as addresses: CuPy need not know bfloat16, and owns nothing.
        """
        return tuple(
            _pack(parameter, argument)
            for parameter, argument in zip(self.instance.parameters, self.arguments, strict=True)
        )

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        devices = {argument.device for argument in self.arguments if isinstance(argument, Tensor)}
        if len(devices) != 1:
            places = ", ".join(sorted(map(str, devices))) or "no device"
            raise LaunchError(f"{self.instance.expression} got tensors on {places}")
        return devices.pop()


def _check(name: str, parameter: Parameter, argument: Argument) -> None:
    where = f"{name}: {parameter.name}"
    if not parameter.pointer:
        if isinstance(argument, Tensor) or argument is None:
            raise LaunchError(f"{where} is a number, got {type(argument).__name__}")
        if parameter.element != "float":
            limit = 1 << (8 * parameter.size - 1)
            if not isinstance(argument, int) or not -limit <= argument < limit:
                raise LaunchError(f"{where} is a whole number of {parameter.size} bytes, got {argument!r}")
    elif isinstance(argument, Tensor):
        vectors = parameter.element == "uint4"  # any elements, moved 16 bytes at a time
        if not vectors and ELEMENTS.get(argument.dtype) != parameter.element:
            raise LaunchError(f"{where} points to {parameter.element}, got {argument.dtype}")
        if argument.data_ptr() % parameter.element_size:
            raise LaunchError(f"{where} is not aligned to {parameter.element_size} bytes")
    elif argument is not None:
        raise LaunchError(f"{where} is a pointer, got {argument!r}")


def _pack(parameter: Parameter, argument: Argument) -> np.generic:
    if parameter.pointer:
        return np.uint64(argument.data_ptr() if isinstance(argument, Tensor) else 0)
    return _SCALARS[parameter.element](argument)


class Backend(Protocol):
    """What launches run on."""

    def serves(self, device: torch.device) -> bool:
        """Whether kernels can be launched for tensors on that device."""
        ...

    def run(self, launch: Launch) -> None: ...


class CupyBackend:
    """NVRTC and the driver, by way of CuPy. What was compiled stays on disk, by the source's text."""

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and fault() is None

    def run(self, launch: Launch) -> None:
        import cupy

        device = launch.device
        if device.type != "cuda":
            raise LaunchError(f"{launch.instance.expression} got tensors on {device}")
        index = torch.cuda.current_device() if device.index is None else device.index
        # The stream is asked for at every launch: while a CUDA graph is captured it is another one.
        stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
        with cupy.cuda.Device(index):
            function = _function(launch.instance, index)
            if launch.shared > _PLAIN_SHARED:
                function.max_dynamic_shared_size_bytes = launch.shared
            function(launch.grid, (launch.threads,), launch.packed, shared_mem=launch.shared, stream=stream)


@cache
def _function(instance: Instance, index: int) -> Any:
    """A CUDA function on that device, which must be the current one."""
    return _module(instance.kernel, index).get_function(instance.expression)


@cache
def _module(kernel: Kernel, index: int) -> Any:
    """A kernel for all of its types. One module a kernel: a server waits only for those that it uses."""
    import cupy

    names = tuple(each.expression for each in kernel.instances)
    return cupy.RawModule(code=cuda_table.source(), options=OPTIONS, name_expressions=names)


@cache
def fault() -> str | None:
    """Why kernels cannot be launched here, in one sentence that says what to do; None if nothing speaks against it.

    CuPy for CUDA 12 finds NVRTC 13 where that is installed too, whose code a driver for 12 does not load.
    """
    extra = f"carpool[cuda{(torch.version.cuda or '12').split('.')[0]}]"
    try:
        import cupy

        compiler, driver = cupy.cuda.nvrtc.getVersion()[0], cupy.cuda.runtime.driverGetVersion() // 1000
    except ImportError:
        return f"CuPy is not installed: pip install '{extra}'."
    except Exception as error:  # no NVRTC, no driver: CuPy has a class of its own for each
        first = str(error).strip().partition("\n")[0]
        return f"CuPy finds no NVRTC or no driver ({first}): pip install '{extra}', and nothing for another CUDA."
    if compiler > driver:
        return (
            f"NVRTC {compiler} compiles for a newer driver than this machine's, which is for CUDA {driver}: install "
            f"carpool[cuda{driver}] alone, or a newer driver."
        )
    return None


def mismatch() -> str | None:
    """That CuPy and torch are for different CUDA versions, where kernels can be launched nevertheless; None if not.

    Each brings its own runtime and the driver serves both, until one of them is updated: better one CUDA for all.
    """
    import cupy

    own, other = str(cupy.cuda.runtime.runtimeGetVersion() // 1000), (torch.version.cuda or "").split(".")[0]
    if other in ("", own):
        return None
    return (
        f"CuPy is for CUDA {own} and torch for CUDA {other}: pip uninstall cupy-cuda{own}x, then "
        f"pip install 'carpool[cuda{other}]'."
    )


backend: Backend = CupyBackend()


def run(
    name: str, types: tuple[str, ...], grid: tuple[int, ...], *arguments: Argument, shared: int = 0
) -> None:
    """Launch the kernel `name` of the table for `types`, with the table's threads a block."""
    instance = cuda_table.instance(name, *types)
    backend.run(Launch(instance, grid, instance.kernel.threads, shared, arguments))
