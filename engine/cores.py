"""Cores: those that this process may compute on, and which of them each worker has to itself.

A core may be several CPUs to the system (hyperthreads), which share what multiplies: one worker a core keeps that busy,
and the other CPUs are there for the event loop. A container may be granted less time than it has cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from carpool.engine.control_groups import groups, read

_SYSTEM = Path("/")
Cpus = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cores:
    """`cpus`: of each core, those that may be used; `quota`: how many cores' time may be taken in all, None for any."""

    cpus: tuple[Cpus, ...]
    quota: float | None = None

    @classmethod
    def here(cls) -> Cores:
        """This process's, as the system tells."""
        allowed = os.sched_getaffinity(0)
        return cls(by_core(allowed, siblings(allowed, _SYSTEM)), quota(_SYSTEM))

    @property
    def workers(self) -> int:
        """As many as can compute at once."""
        granted = len(self.cpus) if self.quota is None else math.ceil(self.quota)
        return max(1, min(len(self.cpus), granted))

    def each(self, workers: int) -> tuple[Cpus, ...]:
        """The CPUs of a core of its own for each worker; () if there are too few."""
        return self.cpus[:workers] if workers <= len(self.cpus) else ()


def by_core(allowed: Iterable[int], siblings: Mapping[int, frozenset[int]]) -> tuple[Cpus, ...]:
    """The allowed CPUs, those of one core together, in order. One whose siblings are not known is a core."""
    cores: dict[frozenset[int], list[int]] = {}
    for cpu in sorted(allowed):
        cores.setdefault(siblings.get(cpu, frozenset([cpu])), []).append(cpu)
    return tuple(map(tuple, cores.values()))


def siblings(cpus: Iterable[int], root: Path) -> dict[int, frozenset[int]]:
    """Of each CPU, all that are the same core. Without those of which the system below `root` says nothing."""
    found = {}
    for cpu in cpus:
        told = read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if told:
            found[cpu] = frozenset(_numbers(told))
    return found


def quota(root: Path) -> float | None:
    """How many cores' time this process's control groups grant it, the least of them all; None if they do not say."""
    granted = [own for folder in groups("cpu", root) if (own := _granted(folder)) is not None]
    return min(granted, default=None)


def _granted(folder: Path) -> float | None:
    """Of one group, in version 2 of control groups or in version 1; None for all there is."""
    told = read(folder / "cpu.max")
    if told is None:
        told = f"{read(folder / 'cpu.cfs_quota_us') or 'max'} {read(folder / 'cpu.cfs_period_us') or ''}"
    time, *period = told.split()
    if time in ("max", "-1") or not period:
        return None
    return int(time) / int(period[0])


def _numbers(told: str) -> Iterator[int]:
    """Of a list as the kernel writes it: 0-2,8."""
    for part in told.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
