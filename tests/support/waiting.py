"""Waiting: what would make the host wait for a device, caught on a CPU, where it costs nothing and goes unnoticed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten

# Operations whose result's value or shape the host must know.
_ASKS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
}
_INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Methods that on a CPU read memory without any operation.
_READS = {
    Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__array__,
}  # fmt: skip
# What is made on the host is copied to the device, behind all that the device has yet to do.
_MAKES = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}


class HostWaits(AssertionError):
    """On a GPU the host would stand still here until the device has caught up."""


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _ASKS:
            raise HostWaits(str(func))
        if func is aten.repeat_interleave.Tensor and given.get("output_size") is None:
            raise HostWaits("repeat_interleave without output_size")
        if func in _INDEXES and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostWaits("an index of bools")
        return func(*args, **given)


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _READS or (func in _MAKES and given.get("device") is not None):
            raise HostWaits(getattr(func, "__name__", str(func)))
        return func(*args, **given)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within this block, what would make the host wait raises HostWaits."""
    with _Functions(), _Operations():  # type: ignore[no-untyped-call]
        yield
