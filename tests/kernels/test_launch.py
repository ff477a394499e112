"""Launching without a device: what CuPy would be handed, byte for byte, and what is refused before it.

`Device` stands where CuPy and the driver are. It reads arguments as the driver does: eight bytes of an address, or as
many as the kernel's parameter has.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from carpool.kernels import cuda_table, launch
from carpool.kernels.launch import CupyBackend, Launch, LaunchError

BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)
PAIR = torch.zeros(2, dtype=torch.int32)


def launched(*arguments: launch.Argument, grid: tuple[int, ...] = (1,)) -> Launch:
    return Launch(cuda_table.instance("step_count"), grid, 128, 0, arguments)


def test_arguments_are_held_against_the_table() -> None:
    ids = torch.zeros(8, dtype=torch.int64)
    assert launched(ids, BOUNDS, PAIR, 2, 0).device == torch.device("cpu")
    for wrong, why in [
        ((ids, BOUNDS, PAIR, 2), "takes 5 arguments, got 4"),
        ((ids, BOUNDS, PAIR, 2.0, 0), "whole number of 4 bytes"),
        ((ids, BOUNDS, PAIR, 1 << 31, 0), "whole number of 4 bytes"),
        ((ids, BOUNDS, PAIR, None, 0), "n is a number"),
        ((ids, BOUNDS, 7, 2, 0), "counts is a pointer"),
    ]:
        with pytest.raises(LaunchError, match=why):
            launched(*wrong)
    for grid in [(0,), (1 << 31,), (1, 1 << 16)]:
        with pytest.raises(LaunchError, match="grid"):
            launched(ids, BOUNDS, PAIR, 2, 0, grid=grid)


def test_tensors_of_two_devices_are_refused() -> None:
    elsewhere = torch.zeros(2, dtype=torch.int32, device="meta")
    with pytest.raises(LaunchError, match="cpu, meta"):
        _ = launched(torch.zeros(8, dtype=torch.int64), BOUNDS, elsewhere, 2, 0).device


def test_a_type_that_is_not_compiled_for_has_no_instance() -> None:
    with pytest.raises(KeyError, match="rotary is not compiled for float, __half"):
        cuda_table.instance("rotary", "float", "__half")


# ── CuPy, as far as it goes without a device ─────────────────────────────────────────────────────────────────────


@dataclass
class Device:
    """A CuPy module that keeps what it is asked for."""

    nvrtc: tuple[int, int] = (12, 9)
    driver: int = 12090
    current: int = 0
    modules: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    asked_more: list[int] = field(default_factory=list)

    def as_cupy(self) -> Any:
        device = self

        class RawModule:
            def __init__(self, **options: Any) -> None:
                device.modules.append({**options, "device": device.current})

            def get_function(self, name: str) -> Any:
                return Function(name)

        class Function:
            def __init__(self, name: str) -> None:
                self._name = name

            def __setattr__(self, name: str, value: Any) -> None:
                if name == "max_dynamic_shared_size_bytes":
                    device.asked_more.append(value)
                object.__setattr__(self, name, value)

            def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int, stream: Any) -> None:
                device.calls.append(
                    {
                        "name": self._name,
                        "grid": grid,
                        "block": block,
                        "bytes": b"".join(value.tobytes() for value in args),
                        "shared": shared_mem,
                        "stream": stream,
                        "device": device.current,
                    }
                )

        class On:
            def __init__(self, index: int) -> None:
                self._index, self._before = index, device.current

            def __enter__(self) -> None:
                device.current = self._index

            def __exit__(self, *_: object) -> None:
                device.current = self._before

        cuda = SimpleNamespace(
            Device=On,
            Stream=SimpleNamespace(from_external=lambda stream: ("from", stream)),
            nvrtc=SimpleNamespace(getVersion=lambda: self.nvrtc),
            runtime=SimpleNamespace(driverGetVersion=lambda: self.driver),
        )
        return SimpleNamespace(RawModule=RawModule, cuda=cuda)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """CuPy is this; tensors on a CPU say that they are on the second CUDA device."""
    device = Device()
    monkeypatch.setitem(sys.modules, "cupy", device.as_cupy())
    monkeypatch.setattr(Launch, "device", property(lambda _: torch.device("cuda", 1)))
    streams = iter(range(100))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: (str(where), next(streams)))
    caches = launch._function, launch._module, launch.fault
    for each in caches:
        each.cache_clear()
    yield device
    for each in caches:
        each.cache_clear()


def count_steps(grid: tuple[int, ...] = (1,), shared: int = 0) -> tuple[Launch, list[Tensor]]:
    tensors = [torch.zeros(8, dtype=torch.int64), BOUNDS, PAIR]
    made = Launch(cuda_table.instance("step_count"), grid, 128, shared, (*tensors, 2, 5))
    CupyBackend().run(made)
    return made, tensors


def test_the_driver_reads_what_was_meant(device: Device) -> None:
    _, tensors = count_steps((3,))
    [call] = device.calls
    assert (call["name"], call["grid"], call["block"], call["shared"]) == ("step_count", (3,), (128,), 0)
    assert struct.unpack("=QQQiq", call["bytes"]) == (*(tensor.data_ptr() for tensor in tensors), 2, 5)


def test_it_runs_on_the_tensors_device_and_the_stream_of_the_moment(device: Device) -> None:
    count_steps()
    count_steps()
    assert [call["device"] for call in device.calls] == [1, 1]
    assert [call["stream"] for call in device.calls] == [("from", ("cuda:1", 0)), ("from", ("cuda:1", 1))]
    assert device.current == 0, "the one that was current is so again"


def test_a_kernel_is_compiled_once_for_all_of_its_types(device: Device) -> None:
    count_steps()
    count_steps()
    [module] = device.modules
    assert module["code"] == cuda_table.source()
    assert "#include <cuda_bf16.h>" in module["code"]
    assert '#include "' not in module["code"], "CuPy's cache does not see what an included file says"
    assert module["name_expressions"] == ("step_count",)
    assert module["options"] == launch.OPTIONS
    assert module["device"] == 1


def test_only_large_blocks_ask_for_more_shared_memory(device: Device) -> None:
    count_steps(shared=48 << 10)
    count_steps(shared=(48 << 10) + 4)
    assert device.asked_more == [(48 << 10) + 4]


def test_a_compiler_newer_than_the_driver_serves_nothing(device: Device) -> None:
    backend, gpu = CupyBackend(), torch.device("cuda", 1)
    assert launch.fault() is None
    assert backend.serves(gpu)
    assert not backend.serves(torch.device("cpu"))
    launch.fault.cache_clear()
    device.nvrtc = (13, 0)
    assert "install carpool[cuda12] alone" in str(launch.fault())
    assert not backend.serves(gpu)


def test_what_cupy_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.fault.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)  # so an import of what is not installed goes
    assert launch.fault() == "CuPy is not installed: pip install 'carpool[cuda12]'."
    launch.fault.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=None))
    assert "finds no NVRTC or no driver" in str(launch.fault())
    launch.fault.cache_clear()


@pytest.mark.parametrize(
    ("runtime", "torchs", "words"),
    [
        (12090, "12.9", None),
        (12090, "12.4", None),
        (13020, "13.0", None),
        (12090, None, None),
        (12090, "13.0", "pip uninstall cupy-cuda12x, then pip install 'carpool[cuda13]'"),
        (13020, "12.8", "pip uninstall cupy-cuda13x, then pip install 'carpool[cuda12]'"),
    ],
)
def test_cupy_and_torch_are_better_for_one_cuda(
    runtime: int, torchs: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: runtime))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.version, "cuda", torchs)
    said = launch.mismatch()
    assert (said is None) if words is None else (words in str(said))


def test_tensors_on_a_cpu_never_reach_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    with pytest.raises(LaunchError, match="got tensors on cpu"):
        count_steps()
