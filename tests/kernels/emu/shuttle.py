"""A device for cases that were written for the emulator: arguments go over, the kernel runs, results come back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from carpool.kernels.launch import Backend, Launch

T = TypeVar("T")


def over(tensor: Tensor, device: torch.device) -> Tensor:
    """The same view of a copy of the whole storage: rows of a wider row keep their neighbours and their stride."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).to(device, copy=True)
    flat = storage.view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass
class Shuttle:
    """Launches of tensors on the host, run by `inner` on `device`."""

    device: torch.device
    inner: Backend
    ran: set[str] = field(default_factory=set)  # names of kernels

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def run(self, launch: Launch) -> None:
        there = [over(each, self.device) if isinstance(each, Tensor) else each for each in launch.arguments]
        self.inner.run(replace(launch, arguments=tuple(there)))
        self.ran.add(launch.instance.kernel.name)
        for parameter, here, back in zip(launch.instance.parameters, launch.arguments, there, strict=True):
            if isinstance(here, Tensor) and isinstance(back, Tensor) and not parameter.const:
                here.copy_(back)


@dataclass
class Both:
    """Every launch on two backends, from the same arguments; what they write must be alike.

    Numbers may be `ulps` of float32 apart, relative to the largest of their tensor, where the two compilers fused
    differently; 16-bit results one of their own steps; whole numbers one, and at most one in a hundred of them.
    """

    first: Backend
    second: Backend
    ulps: int = 16

    def serves(self, device: torch.device) -> bool:
        return self.first.serves(device) and self.second.serves(device)

    def run(self, launch: Launch) -> None:
        copies = tuple(
            over(each, each.device) if isinstance(each, Tensor) else each for each in launch.arguments
        )
        self.second.run(replace(launch, arguments=copies))
        self.first.run(launch)
        for parameter, one, other in zip(launch.instance.parameters, launch.arguments, copies, strict=True):
            if isinstance(one, Tensor) and isinstance(other, Tensor) and not parameter.const:
                name = f"{launch.instance.expression}: {parameter.name}"
                assert alike(one, other, self.ulps), f"{name} differs between the two"


def alike(one: Tensor, other: Tensor, ulps: int) -> bool:
    """See Both; what is NaN in one is NaN in the other."""
    if not one.numel() or one.equal(other):
        return True
    if not one.dtype.is_floating_point:
        if one.dtype == torch.uint8:  # one bit a component: a sign that the last digit decides
            changed = torch.bitwise_xor(one, other)
            return int(sum((changed >> bit & 1).sum() for bit in range(8))) <= 1 + one.numel() * 8 // 100
        apart = (one.long() - other.long()).abs()
        return int(apart.max()) <= 1 and int(apart.sum()) <= 1 + one.numel() // 100
    step = max(torch.finfo(one.dtype).eps, ulps * torch.finfo(torch.float32).eps)
    a, b = one.double().nan_to_num(nan=1e30), other.double().nan_to_num(nan=1e30)
    room = step * a.abs().clamp_min(float(a.abs().max()) * (0 if one.dtype != torch.float32 else 1)) + 1e-7
    return bool(((a - b).abs() <= room).all())
