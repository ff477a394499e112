"""The report for machines with a GPU, rehearsed without one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import gpu
from report import ROOT

CPU = torch.device("cpu")


def test_each_kernel_is_timed_beside_a_twin_that_computes_the_same() -> None:
    contests = list(gpu._contests(CPU, 2 * gpu.LENGTH))
    assert len(contests) == len({contest.name for contest in contests})
    for contest in contests:
        torch.testing.assert_close(contest.ours(), contest.twin())
        assert contest.bytes > 0


def test_the_table_has_a_line_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    lines = list(gpu._kernels(CPU, gpu.LENGTH))
    assert [len(line) for line in lines] == [5] * len(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_one_sentence_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "torch finds no CUDA device here; --device cpu rehearses without one.\n"
