"""What this process may use of the machine: also inside a container, and where it lies in a group of a group."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LIMITS = {2: ("memory.max", "memory.current", "inactive_file"),
           1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip


def num_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may use: those that it may run on, or fewer where its groups have a quota.

    Args:
        root: where /proc and /sys are.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *_quotas(root)]))


@cache
def _quotas(root: Path) -> list[int]:
    """CPUs that each of the groups with a quota may use."""
    quotas = (_quota(version, group) for version, group in _groups(root, "cpu"))
    return [math.ceil(quota) for quota in quotas if quota is not None]


@cache
def cpu_name() -> str:
    """What the processor calls itself."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take, by what the system and its groups tell; 8 GiB where they do not.

    Args:
        root: where /proc and /sys are.
    """
    free = [_of_the_system(root, "MemAvailable")]
    for limit, used in _memory_of_groups(root):
        if used is not None:
            free.append(max(0, limit - used))
    return min(free)


def total_memory(root: Path = Path("/")) -> int:
    """Bytes that this process and its groups may take in all; 8 GiB where the system does not tell."""
    return min([_of_the_system(root, "MemTotal"), *(limit for limit, _ in _memory_of_groups(root))])


def _of_the_system(root: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 2**33


def _memory_of_groups(root: Path) -> Iterator[tuple[int, int | None]]:
    """The limit of each group that has one, and what is used of it, less what is given back as needed."""
    for version, group in _groups(root, "memory"):
        limit_file, used_file, cache = _LIMITS[version]
        limit, used = _number(group / limit_file), _number(group / used_file)
        given_back = re.search(rf"^{cache} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
        if limit is not None:
            yield limit, None if used is None else used - (int(given_back[1]) if given_back else 0)


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(1 or 2, folder) of the control groups that this process is in, and of all that hold them: each may limit it.

    /proc/self/cgroup says which group it is, /proc/self/mountinfo where groups of which kind are seen, and from which
    group on: inside a container both may begin at its own.
    """
    own: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, group = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), group)  # version 2 has no names: ""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, *_, options = rest.split(" ")
        name = "" if kind == "cgroup2" else controller
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            begin, place = fields.split(" ")[3:5]
            top = root / place.lstrip("/")
            ours = Path(own.get(name, begin))
            seen = ours.is_relative_to(begin) and ".." not in ours.parts  # else it lies outside of what we see
            inside = ours.relative_to(begin) if seen else Path()
            for part in (inside, *inside.parents):
                yield (2 if kind == "cgroup2" else 1), top / part


def _quota(version: int, group: Path) -> float | None:
    """CPUs that a group may use, on the average over a period; None: no limit."""
    if version == 2:
        quota, period, *_ = [*_read(group / "cpu.max").split(), "", ""]
    else:
        quota, period = _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
