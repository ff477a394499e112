"""Control groups: where the kernel says how much of the machine this process may use, in version 1 or 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's group for "cpu", "memory", … and of those around it, as far as they are to be seen."""
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = ("",) if not controllers else (controller, controllers)
        group = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            # In a container a path may be that of the host: then it is not there, and the root is the container's.
            for around in (group, *group.parents):
                yield root / "sys/fs/cgroup" / mount / around


def read(file: Path) -> str | None:
    """What the system tells in a file; None if it does not."""
    try:
        return file.read_text().strip()
    except OSError:
        return None
