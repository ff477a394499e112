"""Staging: what is asked of the driver, and in which order, by a stand-in for it; what arrives is what was sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from carpool.engine import staging
from carpool.engine.staging import Cuda, Host, upload

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
ARRAYS = [
    np.array([7, 8, 9]), np.array([3], np.int32), np.array([True, False]), np.array([], np.int32),
    np.arange(5, dtype=np.int8),
]  # fmt: skip


class Driver:
    """Stands where torch.cuda is. Copies are made when the host has waited for the event behind them, not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.due: list[Any] = []  # copies that the device has not made yet
        self.stream = "compute"
        self.lost = False
        for name in ("Stream", "Event", "current_stream", "set_device", "synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(staging, "_pinned", self.pinned)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda tensor, stream: self.told.append(("keep for", stream.name))
        )

    def Stream(self, device: torch.device) -> Any:
        assert device == DEVICE
        return Stream(self, "copies")

    def Event(self, *, blocking: bool) -> Any:
        assert blocking
        return Event(self)

    def current_stream(self, device: torch.device) -> Any:
        assert device == DEVICE
        return Stream(self, self.stream)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    def set_device(self, device: torch.device) -> None:
        self.told.append(("bind", device))

    def synchronize(self, device: torch.device) -> None:
        self.told.append(("synchronize",))
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def empty_cache(self) -> None:
        self.told.append(("empty cache",))

    def pinned(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype).as_subclass(Pinned).of(self)


class Pinned(Tensor):
    """Host memory into which a copy that nobody waited for has brought nothing yet."""

    driver: Driver

    def of(self, driver: Driver) -> Pinned:
        self.driver = driver
        return self

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Pinned:
        if non_blocking:
            self.driver.told.append(("copy", self.driver.stream))
            self.driver.due.append(lambda: Tensor.copy_(self, source))
        else:
            Tensor.copy_(self, source)
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:  # type: ignore[override]
        self.driver.told.append(("upload", device, non_blocking))
        return self.as_subclass(Tensor).clone()


class Stream:
    def __init__(self, driver: Driver, name: str) -> None:
        self.driver, self.name = driver, name

    def record_event(self) -> Event:
        self.driver.told.append(("record", self.name))
        return Event(self.driver)

    def wait_event(self, event: Event) -> None:
        self.driver.told.append(("wait", self.name))


class Event:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.before: list[Any] = []

    def record(self, stream: Stream) -> None:
        self.driver.told.append(("record", stream.name))
        self.before, self.driver.due = self.driver.due, []

    def synchronize(self) -> None:
        self.driver.told.append(("host waits",))
        for copy in self.before:
            copy()
        self.before = []


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_a_cpu_reads_the_arrays_where_they_are() -> None:
    for tensor, array in zip(upload(CPU, *ARRAYS), ARRAYS, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numel() == 0 or tensor.data_ptr() == array.ctypes.data


def test_a_device_gets_all_arrays_in_one_copy_that_nobody_waits_for(driver: Driver) -> None:
    tensors = upload(DEVICE, *ARRAYS)
    assert driver.told == [("upload", DEVICE, True)]
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_results_are_copied_beside_the_next_batch_and_only_landing_waits(driver: Driver) -> None:
    device = Cuda(DEVICE)
    assert device.depth == 2
    device.bind()
    tensors = torch.arange(6.0).view(2, 3), torch.arange(4).bfloat16()
    arrive = device.send_for(tensors)
    assert driver.told == [
        ("bind", DEVICE),
        ("record", "compute"),
        ("wait", "copies"),
        *[("copy", "copies"), ("keep for", "copies")] * 2,
        ("record", "copies"),
    ]
    first, second = arrive()
    assert driver.told[-1] == ("host waits",)
    assert np.array_equal(first, tensors[0].numpy())
    assert second.dtype == ml_dtypes.bfloat16
    assert second.tolist() == [0, 1, 2, 3]


def test_each_batch_waits_for_its_own_copies(driver: Driver) -> None:
    """Two under way: landing the first does not wait for the second, and neither reads what is not there yet."""
    device = Cuda(DEVICE)
    landings = [device.send_for([torch.full((3,), float(number))]) for number in (1, 2)]
    assert len(driver.due) == 0, "each event is behind its copies"
    assert [landing()[0].tolist() for landing in landings] == [[1, 1, 1], [2, 2, 2]]


def test_what_arrived_is_not_pinned_memory_that_comes_back_to_another_batch(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch hands a pinned block out again once it is let go; here it is always the same one."""
    block = driver.pinned((3,), torch.float32)
    monkeypatch.setattr(staging, "_pinned", lambda shape, dtype: block)
    device = Cuda(DEVICE)
    (first,) = device.send_for([torch.ones(3)])()
    device.send_for([torch.zeros(3)])()
    assert first.tolist() == [1, 1, 1]


def test_after_a_failure_the_cache_is_freed_and_a_lost_device_is_found_out(driver: Driver) -> None:
    device = Cuda(DEVICE)
    device.recover()
    assert driver.told == [("synchronize",), ("empty cache",)]
    driver.lost = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.recover()


def test_a_cpu_has_its_results_at_once() -> None:
    half = torch.tensor([1.0, 2.5]).bfloat16()
    (row,) = Host().send_for([half])()
    assert row.dtype == ml_dtypes.bfloat16
    assert row.tolist() == [1.0, 2.5]
    assert Host().depth == 1
