"""Free memory: what this process may still take, of the machine and by its control groups.

Files that the system keeps in memory count as free where it gives them up for whoever needs the room.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from carpool.engine.control_groups import groups, read

_SYSTEM = Path("/")
# Beyond `high` all that a group does is slowed down.
_LIMITS = "memory.max", "memory.high", "memory.limit_in_bytes"
_USED = "memory.current", "memory.usage_in_bytes"
# The second is of version 1, whose first leaves out groups within.
_GIVEN_UP = "inactive_file", "total_inactive_file"


def free_memory(root: Path = _SYSTEM) -> int | None:
    """Bytes; None if the system does not say."""
    each = (_of_machine(root), *map(_of_group, groups("memory", root)))
    return max(0, min(told)) if (told := [room for room in each if room is not None]) else None


def _of_machine(root: Path) -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", read(root / "proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _of_group(folder: Path) -> int | None:
    """Bytes below its limit; None for no limit, which version 1 writes as a number larger than any memory."""
    limits, used = _numbers(folder, _LIMITS), _numbers(folder, _USED)
    if not limits or not used:
        return None
    stat = dict(line.split() for line in (read(folder / "memory.stat") or "").splitlines())
    return min(limits) - used[0] + max(int(stat.get(name, 0)) for name in _GIVEN_UP)


def _numbers(folder: Path, names: Iterable[str]) -> list[int]:
    """Of those of the group's files that hold one: not of those that are not there, or say max."""
    each = (read(folder / name) or "" for name in names)
    return [int(told) for told in each if told.isdecimal()]
