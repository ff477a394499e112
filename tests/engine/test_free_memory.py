"""What may still be taken is the least that the machine and all groups around leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from carpool.engine.free_memory import free_memory

MACHINE = {"proc/meminfo": "MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 800 kB"}
KIB = 1024


def told(root: Path, files: Mapping[str, str]) -> int | None:
    """What is free by these files; texts by paths."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return free_memory(root)


def group(path: str, limit: str, used: str, **stat: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}/".replace("//", "/")
    lines = "\n".join(f"{name} {value}" for name, value in stat.items())
    return {folder + "memory.max": limit, folder + "memory.current": used, folder + "memory.stat": lines}


def test_files_that_the_system_keeps_are_free_for_who_needs_the_room(tmp_path: Path) -> None:
    assert told(tmp_path, MACHINE) == 800 * KIB


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", **group("", "300000", "100000", inactive_file=50_000)}
    assert told(tmp_path, {**MACHINE, **files}) == 250_000


def test_the_least_of_all_groups_around_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b",
        **group("a/b", "max", "10"),
        **group("a", "90000", "40000"),
        **group("", "700000", "10"),
    }
    assert told(tmp_path, {**MACHINE, **files}) == 50_000


def test_where_a_group_is_slowed_down_it_takes_no_more(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", **group("", "max", "1000"), "sys/fs/cgroup/memory.high": "5000"}
    assert told(tmp_path, {**MACHINE, **files}) == 4000


@pytest.mark.parametrize("path", ["/", "/docker/3f"])  # as the container sees it, and as its host does
@pytest.mark.parametrize(("limit", "free"), [("300000", 250_000), ("9223372036854771712", 800 * KIB)])
def test_older_groups_are_read_too(tmp_path: Path, path: str, limit: str, free: int) -> None:
    folder = "sys/fs/cgroup/memory/memory."
    files = {
        "proc/self/cgroup": f"4:cpu,cpuacct:/x\n7:memory:{path}\n1:name=systemd:/",
        folder + "limit_in_bytes": limit,
        folder + "usage_in_bytes": "100000",
        folder + "stat": "inactive_file 1\ntotal_inactive_file 50000",
    }
    assert told(tmp_path, {**MACHINE, **files}) == free


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", **group("", "1000", "2000")}
    assert told(tmp_path, {**MACHINE, **files}) == 0


def test_a_system_that_says_nothing_is_not_guessed_at(tmp_path: Path) -> None:
    assert told(tmp_path, {}) is None
    assert free_memory() is None or free_memory() > 0  # type: ignore[operator]
