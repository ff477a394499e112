"""The emulator in the place of a device: what `kernels.launch` starts runs here, from the same tables and arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from carpool.kernels import cuda_table
from carpool.kernels.cuda_table import Instance, Kernel
from carpool.kernels.launch import Launch
from emu import build, nvrtc
from emu.module import RANDOM, Argument, Fresh, Module

# Outputs that a kernel also reads, or leaves in part as they are: all others it must write to the last byte, and may
# not read before.
KEPT = {("kv_write", "key_cache"), ("kv_write", "value_cache")}
PARTLY = {("pool_split", "partial")}
_TOGETHER = (
    5  # instances in one library: enough to share the reading of the source, few enough to build in parallel
)


@dataclass
class Emulated:
    """Runs launches from the source as g++ reads it or, if `arch` is given, from the PTX that NVRTC makes of it."""

    check: bool = False
    arch: int | None = None
    source: str = field(default_factory=cuda_table.source)
    seed: int = 0
    order: int = RANDOM
    preempt: int = 0
    launches: int = 0
    ran: set[str] = field(default_factory=set)  # names of kernels
    # Which instances are built; the others must not be launched.
    only: Callable[[Instance], bool] = lambda instance: True
    _modules: dict[tuple[str, ...], Future[Module]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, seed: int, order: int = RANDOM, preempt: int = 0) -> None:
        """What is launched from here on takes its turns in the same order whenever the same is begun."""
        self.seed, self.order, self.preempt, self.launches = seed, order, preempt, 0

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def run(self, launch: Launch) -> None:
        name = launch.instance.expression
        group = self._group(launch.instance)
        module = self._build(group).result()
        packed = launch.packed
        arguments: list[Argument] = []
        for parameter, given, cell in zip(launch.instance.parameters, launch.arguments, packed, strict=True):
            if not parameter.pointer:
                arguments.append(cell)
                continue
            assert isinstance(cell, np.uint64)
            assert int(cell) == (given.data_ptr() if isinstance(given, Tensor) else 0)
            key = (launch.instance.kernel.name, parameter.name)
            if isinstance(given, Tensor) and not parameter.const and key not in KEPT:
                arguments.append(Fresh(given, whole=key not in PARTLY))
            else:
                assert given is None or isinstance(given, Tensor)
                arguments.append(given)
        self.launches += 1
        self.ran.add(launch.instance.kernel.name)
        module.launch(
            f"k{group.index(name)}",
            launch.grid,
            (launch.threads,),
            arguments,
            shared=launch.shared,
            seed=self.seed + self.launches,
            order=self.order,
            preempt=self.preempt,
        )

    def prepare(self, kernels: Iterable[Kernel]) -> list[Future[Module]]:
        """Starts to build whatever these kernels need."""
        return [
            self._build(group)
            for kernel in kernels
            for group in dict.fromkeys(self._group(each) for each in kernel.instances if self.only(each))
        ]

    def _group(self, instance: Instance) -> tuple[str, ...]:
        """The instances that are built with this one."""
        names = [each.expression for each in instance.kernel.instances if self.only(each)]
        first = names.index(instance.expression) // _TOGETHER * _TOGETHER
        return tuple(names[first : first + _TOGETHER])

    def _build(self, group: tuple[str, ...]) -> Future[Module]:
        with self._lock:
            if group not in self._modules:
                self._modules[group] = build.PARALLEL.submit(self._module, group)
            return self._modules[group]

    def _module(self, group: tuple[str, ...]) -> Module:
        exports = {f"k{i}": name for i, name in enumerate(group)}
        if self.arch is not None:
            return nvrtc.module(self.source, exports, self.arch, check=self.check)
        return Module.compile(self.source, exports, check=self.check)
