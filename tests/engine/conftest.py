"""Tiny checkpoints for every test of the engine, each made once a session, and only if a test asks for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask the network

import pytest
import torch

import tiny
import tiny_heads
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.kernels import launch
from emu.backend import Emulated
from emu.build import MISSING

torch.set_num_threads(1)  # tiny operations lose more than they gain by being spread


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint; not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def made(family: str) -> Path:
        make = {**tiny.FAMILIES, **tiny_heads.FAMILIES, "mpnet": tiny.mpnet}[family]
        make(root / family)
        return root / family

    return made


@pytest.fixture
def fresh(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's tiny checkpoint that a test may change or damage."""

    def copied(family: str) -> Path:
        return Path(shutil.copytree(checkpoint(family), tmp_path / family))

    return copied


@pytest.fixture(scope="session")
def parts(checkpoint: Callable[[str], Path]) -> Callable[[str], Parts]:
    """A family's model as the engine builds it in float32 for one worker."""

    @cache
    def built(family: str) -> Parts:
        return build(EngineConfig(model=str(checkpoint(family)), cpu_workers=1, dtype="float32"))

    return built


@pytest.fixture(scope="session")
def emulator() -> Emulated:
    """For the whole session: what it has built serves every test."""
    return Emulated()


@pytest.fixture
def emulated(emulator: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The CUDA kernels serve tensors on the CPU; `ran` are those that did in this test."""
    if MISSING is not None:
        pytest.skip(MISSING)
    monkeypatch.setattr(launch, "backend", emulator)
    emulator.ran.clear()
    return emulator
