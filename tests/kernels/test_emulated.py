"""The CUDA kernels run on a CPU, from their own source: right to float64, and no access where it must not be.

Nothing here has run on a device. In fast mode the numbers are compared; in check mode every load, store and barrier is
watched besides.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carpool.kernels import cuda_table, launch
from emu import build
from emu.backend import Emulated
from emu.cases import CASES
from emu.choose import Drawn, Seeded

pytestmark = pytest.mark.skipif(build.MISSING is not None, reason=str(build.MISSING))


@pytest.fixture(scope="module", params=["fast", "check"])
def emulated(request: pytest.FixtureRequest) -> Emulated:
    backend = Emulated(check=request.param == "check")
    backend.prepare(cuda_table.KERNELS)
    return backend


@pytest.fixture(autouse=True)
def device(emulated: Emulated) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backend", emulated)
        yield


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_float64(emulated: Emulated, case: str, data: st.DataObject) -> None:
    choose = Drawn(data)
    emulated.begin(choose.whole(0, 999), order=choose.whole(0, 2), preempt=choose.one((0, 7)))
    CASES[case](choose)


def test_every_kernel_runs_in_a_case(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """By seeds, and not by what hypothesis happened to draw above."""
    monkeypatch.setattr(launch, "backend", emulated)
    emulated.ran.clear()
    for case in CASES.values():
        for seed in range(6):
            case(Seeded(seed, (torch.bfloat16,)))
    assert emulated.ran == {kernel.name for kernel in cuda_table.KERNELS}
