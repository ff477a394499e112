"""Staging: how numbers get to the device that computes and back, without the host waiting for it.

All that is CUDA's own in the engine's road of a batch is here; on a CPU there is nothing to carry and nothing to wait
for. The CUDA half has run against a stand-in for the driver only, never on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import Any, Protocol

import ml_dtypes
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Arrival = Callable[[], list[Array]]  # waits for what was sent for

_ALIGNED = 16  # bytes; a kernel may read any of the arrays as vectors of so many


def upload(device: torch.device, *arrays: Array) -> tuple[Tensor, ...]:
    """Arrays [n] of any types on the device: by one copy, which the host does not wait for.

    On a CPU they are the arrays' own memory.
    """
    hosts = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tuple(hosts)
    sizes = [-(-host.nbytes // _ALIGNED) * _ALIGNED for host in hosts]
    *starts, total = accumulate(sizes, initial=0)
    staged = _pinned(total, torch.uint8)
    for start, host in zip(starts, hosts, strict=True):
        staged[start : start + host.nbytes].view(host.dtype).copy_(host)
    # torch keeps pinned memory that is given back until the copies out of it are done.
    there = staged.to(device, non_blocking=True)
    return tuple(
        there[start : start + host.nbytes].view(host.dtype) for start, host in zip(starts, hosts, strict=True)
    )


class Carrier(Protocol):
    """What a runner needs of its device besides tensors."""

    @property
    def depth(self) -> int:
        """Batches that may be under way at once."""
        ...

    def bind(self) -> None:
        """Called once, first, in the thread that runs batches."""

    def send_for(self, tensors: Seq[Tensor]) -> Arrival:
        """Begin to bring tensors to the host; the arrays that arrive are nobody else's."""
        ...

    def recover(self) -> None:
        """After a failure: free what can be freed. Raises if nothing more can be run on the device."""


class Host:
    """A CPU computes while `launch` is called: results are there at once."""

    depth = 1

    def bind(self) -> None:
        """One thread a worker: on a CPU, workers side by side beat threads inside one operation."""
        torch.set_num_threads(1)

    def send_for(self, tensors: Seq[Tensor]) -> Arrival:
        arrays = [_array(tensor) for tensor in tensors]
        return lambda: arrays

    def recover(self) -> None:
        pass


class Cuda:
    """Computes on the thread's current stream and copies results on one of its own.

    So the next batch computes while the results of this one are on their way.
    """

    depth = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def bind(self) -> None:
        torch.cuda.set_device(self._device)

    def send_for(self, tensors: Seq[Tensor]) -> Arrival:
        computed = torch.cuda.current_stream(self._device).record_event()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(computed)
            staged = [_pinned(tensor.shape, tensor.dtype) for tensor in tensors]
            for host, tensor in zip(staged, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
                # Its memory was given out for the other stream, and is not to be given out again before this one
                # has read it, whenever we let go of it.
                tensor.record_stream(self._copies)
            # Waiting sleeps: other threads need the core.
            copied: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self._copies)

        def arrive() -> list[Array]:
            copied.synchronize()
            # Out of pinned memory at once: it is scarce, slow to get, and a client may be slow to take its rows.
            return [_array(host).copy() for host in staged]

        return arrive

    def recover(self) -> None:
        torch.cuda.synchronize(
            self._device
        )  # raises once an illegal access, say, has ended this process's context
        torch.cuda.empty_cache()


def carrier(device: torch.device) -> Carrier:
    return Cuda(device) if device.type == "cuda" else Host()


def _pinned(shape: int | torch.Size, dtype: torch.dtype) -> Tensor:
    """Host memory that a device copies to and from by itself; torch keeps what is given back for the next."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _array(tensor: Tensor) -> Array:
    """The tensor's memory as an array: numpy has no bfloat16 of its own."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
