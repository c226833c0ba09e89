"""What of the machine this process may use: cores and memory, as the kernel and the container's limits have it.

``root`` is where /proc and /sys lie. What cannot be read (another system, a sandbox) is taken to have no limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True)
class Cores:
    """What threads can run on."""

    logical: int  # CPUs that the process may be scheduled on, hyperthreads counted each
    physical: int  # cores that these are of
    quota: float | None = None  # CPUs' worth of time that the container may use; None: all

    def engine_threads(self) -> int:
        """Threads for an engine with an HTTP process beside it.

        One CPU is left to the other process: where two share one, a thread waits milliseconds for its turn, and all
        threads of the engine wait for it at their next barrier. The second hyperthread of a busy core will do, since
        nobody waits there; a thread of the engine on it would only take turns with the first one's arithmetic.
        """
        return max(1, min(self.physical, self.logical - 1, self._affordable()))

    def lone_threads(self) -> int:
        """Threads for an engine that has the machine to itself."""
        return max(1, min(self.physical, self._affordable()))

    def _affordable(self) -> int:
        """Threads beyond the quota would stop all of them for the rest of each period."""
        return self.logical if self.quota is None else int(self.quota)


def cores(allowed: set[int] | None = None, root: Path = ROOT) -> Cores:
    """What this process can run on.

    Args:
        allowed: numbers of the CPUs; default: the process's affinity.
    """
    if allowed is None:
        known = hasattr(os, "sched_getaffinity")
        allowed = os.sched_getaffinity(0) if known else set(range(os.cpu_count() or 1))
    topology = root / "sys/devices/system/cpu"
    siblings = {_text(topology / f"cpu{cpu}/topology/thread_siblings_list") or f"cpu {cpu}" for cpu in allowed}
    quotas = [quota for folder in _cgroups("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return Cores(len(allowed), len(siblings), min(quotas, default=None))


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that can be taken before something is killed: of the machine's, and of each limit around this process.

    What the kernel would drop to make room (unchanged pages of files) counts as free. None if nothing is known.
    """
    found = [left for folder in _cgroups("memory", root) if (left := _left_of_limit(folder)) is not None]
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    return max(0, min(found)) if found else None


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and of those around it, of version 2 or 1; in a container, what it sees."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top if ".." in place else top / place.strip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _cpu_quota(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:  # version 1
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _left_of_limit(folder: Path) -> int | None:
    names = ("memory.max", "memory.current", "inactive_file")
    if not (folder / names[0]).exists():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, used = _text(folder / names[0]), _text(folder / names[1])
    if not limit.isdigit() or not used.isdigit():  # "max": none
        return None
    counts = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    return int(limit) - int(used) + int(counts.get(names[2], 0))


def _text(path: Path) -> str:
    """A small file's content; empty where there is none to be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
