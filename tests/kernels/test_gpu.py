"""The CUDA kernels on a device: against float64, against the emulator, on other streams, in graphs.

`./dev bench gpu` runs these, and all else that is marked `gpu`, and prints a report. They have not run on a device yet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from carpool.kernels import cuda_ops, cuda_table, launch, reference
from carpool.kernels.launch import CupyBackend
from emu import build
from emu.backend import Emulated
from emu.cases import CASES
from emu.choose import Seeded, bounds, normal
from emu.shuttle import Both, Shuttle

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
SEEDS = 12
Plan = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def shuttle(monkeypatch: pytest.MonkeyPatch) -> Shuttle:
    shuttle = Shuttle(DEVICE, CupyBackend())
    monkeypatch.setattr(launch, "backend", shuttle)
    return shuttle


def test_kernels_can_be_launched_here() -> None:
    assert launch.fault() is None


@pytest.mark.parametrize("case", CASES)
def test_a_device_equals_float64(shuttle: Shuttle, case: str) -> None:
    for seed in range(SEEDS):
        CASES[case](Seeded(seed))


def test_every_kernel_ran_on_the_device(shuttle: Shuttle) -> None:
    for case in CASES.values():
        for seed in range(SEEDS):
            case(Seeded(seed))
    assert shuttle.ran == {kernel.name for kernel in cuda_table.KERNELS}


@pytest.mark.skipif(build.MISSING is not None, reason=str(build.MISSING))
@pytest.mark.parametrize("case", CASES)
def test_a_device_equals_the_emulator(shuttle: Shuttle, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", Both(shuttle, Emulated()))
    for seed in range(SEEDS):
        CASES[case](Seeded(seed))


# ── torch's stream, graphs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pooling() -> tuple[torch.Tensor, Plan]:
    """Rows [T, H], and bounds, modes, widths and flags on the device, as `pool_rows` takes them."""
    runs = [3, 700, 1, 64, 129]
    hidden = normal(Seeded(1), sum(runs), 384, dtype=torch.bfloat16).to(DEVICE)
    modes = torch.tensor([reference.CLS, reference.MEAN, reference.LAST, reference.MEAN, reference.MEAN])
    widths = torch.tensor([384, 384, 128, 384, 17], dtype=torch.int32)
    unit = torch.tensor([True, True, True, False, True])
    bounds_, modes, widths, unit = (x.to(DEVICE) for x in (bounds(runs), modes.to(torch.int8), widths, unit))
    return hidden, (bounds_, modes, widths, unit)


def test_a_launch_waits_for_what_its_stream_was_given_before(pooling: tuple[torch.Tensor, Plan]) -> None:
    hidden, plan = pooling
    expected, _ = reference.pool_rows(2 * hidden, *plan)
    stream = torch.cuda.Stream(DEVICE)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        busy = torch.randn(4096, 4096, device=DEVICE)
        for _ in range(20):  # milliseconds of work before the rows are there
            busy = busy @ busy * 1e-3
        late = hidden * 2 + (busy[0, 0] * 0).nan_to_num().to(hidden.dtype)
        got, _ = cuda_ops.pool_rows(late, *plan)
    stream.synchronize()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_captured_launch_reads_what_its_inputs_hold_at_replay(pooling: tuple[torch.Tensor, Plan]) -> None:
    hidden, plan = pooling
    cuda_ops.pool_rows(hidden, *plan, longest=700)  # compiled and loaded before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = cuda_ops.pool_rows(hidden, *plan, longest=700)
    for factor in (1, -3):
        hidden.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(got, reference.pool_rows(hidden, *plan)[0], rtol=1e-5, atol=1e-5)


def test_nothing_that_a_kernel_does_makes_the_host_wait(pooling: tuple[torch.Tensor, Plan]) -> None:
    hidden, plan = pooling
    cuda_ops.pool_rows(hidden, *plan, longest=700)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda_ops.pool_rows(hidden, *plan, longest=700)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ── NVIDIA's own checker ─────────────────────────────────────────────────────────────────────────────────────────

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer, of the CUDA toolkit, is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """Each case once for a few seeds, with every allocation a CUDA allocation of its own."""
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    cases = [sys.executable, "-m", "emu.sanitized", "3"]
    # Without torch's pool: the checker knows an allocation's end only where there is one.
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [*command, *cases], capture_output=True, text=True, timeout=1800, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
