"""What carries the emulator's cases to a device, tried with a device that is the host."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from carpool.kernels import cuda_ops, launch
from carpool.kernels.launch import Launch
from emu import build
from emu.backend import Emulated
from emu.cases import CASES
from emu.choose import Seeded
from emu.shuttle import Both, Shuttle, alike, over

needs_gcc = pytest.mark.skipif(build.MISSING is not None, reason=str(build.MISSING))
HOST = torch.device("cpu")


def test_a_view_goes_over_with_its_neighbours_and_its_stride() -> None:
    row = torch.arange(24.0).view(2, 3, 4)
    view = row[:, 1:2]
    there = over(view, HOST)
    assert there.equal(view)
    assert there.stride() == view.stride()
    assert there.storage_offset() == view.storage_offset()
    there.zero_()
    assert view.sum() > 0, "a copy"


@needs_gcc
@pytest.mark.parametrize("case", ["pool_rows", "rotary", "paged"])
def test_cases_hold_by_way_of_a_shuttle(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Shuttle(HOST, Emulated())
    monkeypatch.setattr(launch, "backend", backend)
    for seed in range(3):
        CASES[case](Seeded(seed, (torch.float32,), ("float32",)))
    assert backend.ran


@dataclass
class Wrong:
    """Does what the emulator does, and one number otherwise."""

    inner: Emulated

    def serves(self, device: torch.device) -> bool:
        return True

    def run(self, launch: Launch) -> None:
        self.inner.run(launch)
        for parameter, each in zip(launch.instance.parameters, launch.arguments, strict=True):
            if isinstance(each, Tensor) and not parameter.const and each.numel():
                each.view(-1)[0] += 0.01


@needs_gcc
def test_two_backends_that_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = Emulated()
    x, kinds = torch.randn(3, 5), torch.zeros(3, dtype=torch.int8)
    monkeypatch.setattr(launch, "backend", Both(emulated, emulated))
    cuda_ops.activate_rows(x, kinds)
    monkeypatch.setattr(launch, "backend", Both(emulated, Wrong(emulated)))
    with pytest.raises(AssertionError, match="activate_rows<float>: out differs"):
        cuda_ops.activate_rows(x, kinds)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([1.0, 100.0]), torch.tensor([1.0 + 1e-6, 100.0]), True),
        (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0001]), False),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([1.0]).half(), torch.tensor([1.0 + 2**-10]).half(), True),
        (torch.tensor([1.0]).half(), torch.tensor([1.01]).half(), False),
        (torch.tensor([5, 5], dtype=torch.int8), torch.tensor([5, 6], dtype=torch.int8), True),
        (torch.tensor([5, 5], dtype=torch.int8), torch.tensor([5, 7], dtype=torch.int8), False),
        (torch.tensor([0b1000], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8), True),
        (torch.tensor([0b1010], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8), False),
    ],
)
def test_alike_is_to_the_last_digits(one: Tensor, other: Tensor, same: bool) -> None:
    assert alike(one, other, 16) is same
