"""What of a machine may be used: cores, quotas and memory, from files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from decoding.machine import Cores, available_memory, cores

UNLIMITED = 2**63 - 4096  # what version 1 of cgroups says where there is no limit


class FakeMachine:
    """/proc and /sys in a folder."""

    def __init__(self, root: Path, *, cgroup: str = "0::/") -> None:
        self.root = root
        self.write("proc/self/cgroup", cgroup)

    def write(self, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")

    def hyperthreads(self, pairs: int) -> None:
        """CPU n and CPU n + pairs are one core."""
        for cpu in range(2 * pairs):
            first = cpu % pairs
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{first},{first + pairs}")

    def cores(self, count: int) -> Cores:
        return cores(set(range(count)), self.root)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_one_core_is_left_to_the_http_process(machine: FakeMachine) -> None:
    assert [machine.cores(n).engine_threads() for n in (1, 2, 8)] == [1, 1, 7]
    assert [machine.cores(n).lone_threads() for n in (1, 2, 8)] == [1, 2, 8]


def test_hyperthreads_get_no_thread_of_their_own_and_serve_the_http_process(machine: FakeMachine) -> None:
    machine.hyperthreads(4)
    assert machine.cores(8) == Cores(logical=8, physical=4)
    assert machine.cores(8).engine_threads() == 4
    assert cores({0, 1, 2}, machine.root).engine_threads() == 2  # one hyperthread of each: three cores
    assert cores({0, 4}, machine.root) == Cores(logical=2, physical=1)
    assert cores({0, 4}, machine.root).engine_threads() == 1


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 63), ("9900000 100000", 63)],
)
def test_a_containers_quota_bounds_the_threads(machine: FakeMachine, quota: str, threads: int) -> None:
    machine.write("sys/fs/cgroup/cpu.max", quota)
    assert machine.cores(64).engine_threads() == threads


def test_the_tightest_quota_around_a_process_counts(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, cgroup="0::/pods/pod7/box")
    machine.write("sys/fs/cgroup/pods/pod7/box/cpu.max", "max 100000")
    machine.write("sys/fs/cgroup/pods/pod7/cpu.max", "300000 100000")
    machine.write("sys/fs/cgroup/pods/cpu.max", "1600000 100000")
    assert machine.cores(64).quota == 3.0


@pytest.mark.parametrize("visible", ["docker/abc", ""])
def test_version_1_of_cgroups(tmp_path: Path, visible: str) -> None:
    """A container names the host's path but often sees its own folder as the top."""
    machine = FakeMachine(tmp_path, cgroup="5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/")
    machine.write(f"sys/fs/cgroup/cpu/{visible}/cpu.cfs_quota_us", "400000")
    machine.write(f"sys/fs/cgroup/cpu/{visible}/cpu.cfs_period_us", "100000")
    machine.write(f"sys/fs/cgroup/memory/{visible}/memory.limit_in_bytes", str(10 * 2**30))
    machine.write(f"sys/fs/cgroup/memory/{visible}/memory.usage_in_bytes", str(4 * 2**30))
    machine.write(f"sys/fs/cgroup/memory/{visible}/memory.stat", f"cache 5\ntotal_inactive_file {2**30}")
    assert machine.cores(64).quota == 4.0
    assert available_memory(machine.root) == 7 * 2**30
    machine.write(f"sys/fs/cgroup/cpu/{visible}/cpu.cfs_quota_us", "-1")
    machine.write(f"sys/fs/cgroup/memory/{visible}/memory.limit_in_bytes", str(UNLIMITED))
    machine.write("proc/meminfo", "MemTotal:       8 kB\nMemAvailable:       6 kB")
    assert machine.cores(64).quota is None
    assert available_memory(machine.root) == 6 * 1024


def test_memory_is_the_least_of_what_the_machine_and_the_container_have(machine: FakeMachine) -> None:
    assert available_memory(machine.root) is None
    machine.write("proc/meminfo", f"MemTotal:  99999999 kB\nMemAvailable:   {8 * 2**20} kB\nCached: 1 kB")
    assert available_memory(machine.root) == 8 * 2**30
    machine.write("sys/fs/cgroup/memory.max", "max")
    machine.write("sys/fs/cgroup/memory.current", str(2**30))
    assert available_memory(machine.root) == 8 * 2**30
    machine.write("sys/fs/cgroup/memory.max", str(3 * 2**30))
    machine.write("sys/fs/cgroup/memory.stat", f"anon 17\nactive_file 3\ninactive_file {2**29}")
    assert available_memory(machine.root) == 2 * 2**30 + 2**29
    machine.write("sys/fs/cgroup/memory.current", str(4 * 2**30))
    assert available_memory(machine.root) == 0


def test_a_path_that_leaves_the_mounted_tree_is_not_followed(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, cgroup="0::/../../other")
    machine.write("sys/fs/cgroup/cpu.max", "200000 100000")
    machine.write("other/cpu.max", "100000 100000")
    assert machine.cores(8).quota == 2.0


def test_this_machine_has_cores_and_memory() -> None:
    here = cores()
    assert 1 <= here.physical <= here.logical <= (os.cpu_count() or 1)
    assert 1 <= here.engine_threads() <= here.logical
    left = available_memory()
    assert left is None or left > 0
