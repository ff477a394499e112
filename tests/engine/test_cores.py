"""The cores that are there for workers: never one that is not allowed, never more than time is granted for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.cores import Cores, Cpus, by_core, quota, siblings


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Texts by the paths of their files."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


# ── which CPUs are one core ──────────────────────────────────────────────────────────────────────────────────


def test_hyperthreads_are_one_core(tmp_path: Path) -> None:
    told = enumerate(["0,4", "1,5", "2-3", "2-3", "0,4", "1,5"])
    write(tmp_path, {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": own for i, own in told})
    everywhere = siblings(range(7), tmp_path)
    assert everywhere[2] == {2, 3}
    assert 6 not in everywhere
    assert by_core(range(7), everywhere) == ((0, 4), (1, 5), (2, 3), (6,))
    assert by_core({5, 1, 4}, everywhere) == ((1, 5), (4,)), "what is not allowed is not there"


@given(st.sets(st.integers(0, 15), min_size=1), st.integers(1, 4))
def test_every_allowed_cpu_is_of_one_core(allowed: set[int], threads: int) -> None:
    each = {cpu: frozenset(c for c in range(16) if c // threads == cpu // threads) for cpu in range(16)}
    cores = by_core(allowed, each)
    assert sorted(cpu for core in cores for cpu in core) == sorted(allowed)
    assert all(len({cpu // threads for cpu in core}) == 1 for core in cores)


# ── what time is granted ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("told", "granted"), [("150000 100000", 1.5), ("max 100000", None), ("6400000 100000", 64)]
)
def test_a_container_is_granted_what_its_group_says(tmp_path: Path, told: str, granted: float | None) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": told})
    assert quota(tmp_path) == granted


def test_the_least_of_all_groups_around_counts(tmp_path: Path) -> None:
    told = {"a/b/c": "max 100000", "a/b": "200000 100000", "a": "800000 100000"}
    write(tmp_path, {f"sys/fs/cgroup/{path}/cpu.max": own for path, own in told.items()})
    write(tmp_path, {"proc/self/cgroup": "0::/a/b/c"})
    assert quota(tmp_path) == 2


@pytest.mark.parametrize("path", ["/", "/docker/3f"])  # as the container sees it, and as its host does
@pytest.mark.parametrize(("told", "granted"), [("250000", 2.5), ("-1", None)])
def test_older_groups_are_read_too(tmp_path: Path, path: str, told: str, granted: float | None) -> None:
    write(tmp_path, {"proc/self/cgroup": f"7:memory:/x\n4:cpu,cpuacct:{path}\n1:name=systemd:/"})
    group = {"cpu.cfs_quota_us": told, "cpu.cfs_period_us": "100000"}
    write(tmp_path / "sys/fs/cgroup/cpu", group)
    assert quota(tmp_path) == granted


def test_a_system_without_groups_grants_all(tmp_path: Path) -> None:
    assert quota(tmp_path) is None
    assert siblings([0, 1], tmp_path) == {}


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────

FOUR = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(("granted", "workers"), [(None, 4), (2.0, 2), (1.5, 2), (0.5, 1), (64.0, 4)])
def test_one_worker_a_core_that_time_is_granted_for(granted: float | None, workers: int) -> None:
    assert Cores(FOUR, granted).workers == workers


@pytest.mark.parametrize(("workers", "cpus"), [(1, FOUR[:1]), (4, FOUR), (5, ())])
def test_each_worker_has_a_core_to_itself_or_none_has(workers: int, cpus: tuple[Cpus, ...]) -> None:
    """Two on one core would leave another idle."""
    assert Cores(FOUR).each(workers) == cpus


def test_this_machine_has_the_cores_that_are_allowed() -> None:
    cores = Cores.here()
    assert {cpu for core in cores.cpus for cpu in core} == os.sched_getaffinity(0)
    assert 1 <= cores.workers <= len(cores.cpus)
