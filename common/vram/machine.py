"""The memory of this machine, or of what of it the container may have."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ControlGroup:
    """The files in which Linux says what a container may have and has, in a folder; all of bytes.

    Attributes:
        cache: line of `stat` with the pages of files that are given up before the limit is felt.
    """

    limit: str
    used: str
    stat: str
    cache: str


CONTROL_GROUPS = Path("/sys/fs/cgroup")
VERSIONS = (
    ControlGroup("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ControlGroup(
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"
    ),
)


def machine_bytes(folder: Path = CONTROL_GROUPS) -> int:
    """Bytes of this machine, or of what of it the container may have.

    Args:
        folder: of the control groups.
    """
    whole, limited = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _limited(folder)
    return min(whole, limited[0]) if limited else whole


def free_machine_bytes(folder: Path = CONTROL_GROUPS) -> int | None:
    """Memory that a process can have of the machine, whatever card there is; None if unknown."""
    try:
        available = _number_of(Path("/proc/meminfo"), "MemAvailable:") * 1024
    except (OSError, StopIteration):
        return None
    if limited := _limited(folder):
        available = min(available, limited[1])
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes here share it


def resident_bytes() -> int | None:
    """Memory of the machine that this process holds now; None if unknown."""
    try:
        return _number_of(Path("/proc/self/status"), "VmRSS:") * 1024
    except (OSError, StopIteration):
        return None


def _limited(folder: Path) -> tuple[int, int] | None:
    """(bytes that the container may have, what is left of them); None without a limit."""
    for group in VERSIONS:
        with contextlib.suppress(OSError, ValueError, StopIteration):  # version 2 writes "max" where there is none
            limit, used = (int((folder / name).read_text()) for name in (group.limit, group.used))
            return limit, max(0, limit - used + _number_of(folder / group.stat, group.cache))
    return None


def _number_of(file: Path, name: str) -> int:
    """The number that follows a name at the start of a line. Raises OSError or StopIteration where there is none."""
    return next(int(words[1]) for line in file.read_text().splitlines() if (words := line.split())[:1] == [name])
