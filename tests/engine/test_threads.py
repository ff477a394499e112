"""Over how many threads torch spreads an operation while a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from carpool.engine import threads
from carpool.engine.cores import Cores

MIB = 1 << 20


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Cores, "here", lambda: Cores(tuple((cpu,) for cpu in range(8))))
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


def spread_over(folder: Path) -> int:
    with threads.spread(folder):
        return torch.get_num_threads()


def hold(file: Path, size: int) -> None:
    with file.open("wb") as opened:
        opened.truncate(size)  # takes no room on the disk


@pytest.mark.parametrize(("mib", "wanted"), [(1, 1), (511, 1), (513, 2), (1024, 4), (9999, 6)])
def test_each_has_its_share_of_the_weights_and_there_are_no_more_than_before(
    mib: int, wanted: int, tmp_path: Path
) -> None:
    hold(tmp_path / "model.safetensors", mib * MIB)
    assert spread_over(tmp_path) == wanted
    assert torch.get_num_threads() == 6


def test_all_files_of_the_weights_count_and_no_other_spelling_of_them(tmp_path: Path) -> None:
    hold(tmp_path / "pytorch_model.bin", 1024 * MIB)
    assert spread_over(tmp_path) == 4
    hold(tmp_path / "model-1.safetensors", 256 * MIB)
    hold(tmp_path / "model-2.safetensors", 256 * MIB)
    assert spread_over(tmp_path) == 2


def test_there_are_no_more_than_may_compute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path / "model.safetensors", 9999 * MIB)
    monkeypatch.setattr(Cores, "here", lambda: Cores(tuple((cpu,) for cpu in range(8)), quota=2.5))
    assert spread_over(tmp_path) == 3


def test_a_folder_without_weights_is_for_the_loader_to_complain_of(tmp_path: Path) -> None:
    assert spread_over(tmp_path) == 1


def test_a_failure_leaves_them_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"), threads.spread(tmp_path):
        raise OSError("gone")
    assert torch.get_num_threads() == 6
