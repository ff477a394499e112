"""Description: options without effect, and what is missing beside a device, are said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny_today
from building import built, planned
from carpool.engine.config import EngineConfig
from carpool.engine.description import _device_notices
from carpool.kernels import launch, native

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def test_options_for_the_other_kind_of_device_are_noticed(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = built(checkpoint("bert"), device="cpu", gpu_memory_utilization=0.9)
    assert parts.model.notices == ("--gpu-memory-utilization has no meaning on a CPU.",)
    monkeypatch.setattr(launch, "fault", lambda: None)
    monkeypatch.setattr(launch, "mismatch", lambda: None)
    notices = list(_device_notices(planned(EngineConfig(cpu_workers=2, gpu_memory_utilization=0.9), GPU)))
    assert len(notices) == 1
    assert notices[0].startswith("--cpu-workers has no meaning on a GPU")
    assert list(_device_notices(planned(EngineConfig(pin_workers=True), GPU))) == [
        "--pin-workers has no meaning on a GPU."
    ]


def test_lengths_are_sorted_where_attention_takes_equal_ones_at_a_time(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_today.make("qwen3", tmp_path)
    heads_of_32, heads_of_8 = built(tmp_path).model, built(checkpoint("bert")).model
    assert heads_of_32.by_length is (native.library is None)
    assert heads_of_8.by_length, "the twin attends"


def test_what_is_missing_beside_a_gpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "fault", lambda: "CuPy is not installed: pip install 'carpool[cuda13]'.")
    monkeypatch.setattr(launch, "mismatch", lambda: pytest.fail("it cannot be asked without CuPy"))
    (notice,) = _device_notices(planned(EngineConfig(), GPU))
    assert "torch serves in their place, slower: CuPy is not installed: pip install" in notice
    monkeypatch.setattr(launch, "fault", lambda: None)
    monkeypatch.setattr(launch, "mismatch", lambda: "CuPy is for CUDA 12 and torch for CUDA 13.")
    assert list(_device_notices(planned(EngineConfig(), GPU))) == [
        "CuPy is for CUDA 12 and torch for CUDA 13."
    ]
    assert list(_device_notices(planned(EngineConfig(), CPU))) == []
