"""What a process may use: control groups of both versions, nested or seen from a container; /proc and /sys made up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cvlctl.machine import free_memory, num_cpus, total_memory

GB, NO_LIMIT = 2**30, 9223372036854771712  # what version 1 says where there is no limit
V1 = "32 31 0:29 {begin} /sys/fs/cgroup/{name} rw,relatime shared:9 - cgroup cgroup rw,{name}\n"
V2 = "41 31 0:38 {begin} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER = "22 1 0:20 / / rw - ext4 /dev/root rw\n"


@pytest.fixture(autouse=True)
def _sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def machine(root: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": f"MemTotal: {128 * 2**20} kB\nMemAvailable:   {64 * 2**20} kB\n"} | files
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(group: str, begin: str = "/") -> dict[str, str]:
    return {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": OTHER + V2.format(begin=begin)}


def v1(group: str, begin: str = "/") -> dict[str, str]:
    mounts = OTHER + "".join(V1.format(begin=begin, name=name) for name in ("cpu,cpuacct", "memory", "pids"))
    return {"proc/self/cgroup": f"4:memory:{group}\n3:cpu,cpuacct:{group}\n0::/\n", "proc/self/mountinfo": mounts}


def test_a_machine_without_groups(tmp_path: Path) -> None:
    assert num_cpus(tmp_path) == 16 and free_memory(tmp_path) == total_memory(tmp_path) == 8 * GB
    assert free_memory(machine(tmp_path, {})) == 64 * GB
    assert num_cpus() >= 1 and 2**20 < free_memory() < 2**45  # of the machine that runs the test


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 16), ("400000 100000", 4), ("150000 100000", 2), ("20000 100000", 1), ("9900000 100000", 16),
     ("", 16), ("nonsense", 16), ("5 0", 16), ("-1 100000", 16)],
)  # fmt: skip
def test_a_quota_of_version_2(quota: str, cpus: int, tmp_path: Path) -> None:
    assert num_cpus(machine(tmp_path, v2("/") | {"sys/fs/cgroup/cpu.max": quota + "\n"})) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 16), ("400000", 4), ("150000", 2), ("1000", 1)])
def test_a_quota_of_version_1(quota: str, cpus: int, tmp_path: Path) -> None:
    place = "sys/fs/cgroup/cpu,cpuacct/a"
    files = {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": "100000\n"}
    assert num_cpus(machine(tmp_path, v1("/a") | files)) == cpus


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files = {
        f"{top}/memory.max": "max\n", f"{top}/cpu.max": "max 100000\n",
        f"{top}/slice/cpu.max": "300000 100000\n", f"{top}/slice/job/cpu.max": "max 100000\n",
        f"{top}/slice/memory.max": f"{20 * GB}\n", f"{top}/slice/memory.current": f"{15 * GB}\n",
        f"{top}/slice/job/memory.max": f"{8 * GB}\n", f"{top}/slice/job/memory.current": f"{GB}\n",
        f"{top}/other/cpu.max": "100000 100000\n",
    }  # fmt: skip
    root = machine(tmp_path, v2("/slice/job") | files)
    assert num_cpus(root) == 3
    assert free_memory(root) == 5 * GB  # its neighbours in the slice have taken the rest


def test_memory_of_version_1_and_what_the_cache_gives_back(tmp_path: Path) -> None:
    place = "sys/fs/cgroup/memory"
    files = {f"{place}/memory.limit_in_bytes": f"{NO_LIMIT}\n", f"{place}/memory.usage_in_bytes": f"{40 * GB}\n"}
    root = machine(tmp_path, v1("/a") | files)
    assert free_memory(root) == 64 * GB
    (root / place / "a").mkdir()
    (root / place / "a" / "memory.limit_in_bytes").write_text(f"{4 * GB}\n")
    (root / place / "a" / "memory.usage_in_bytes").write_text(f"{3 * GB}\n")
    assert free_memory(root) == GB and total_memory(root) == 4 * GB
    (root / place / "a" / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {2 * GB}\n")
    assert free_memory(root) == 3 * GB
    (root / place / "a" / "memory.usage_in_bytes").write_text(f"{9 * GB}\n")  # over the limit, for a moment
    assert free_memory(root) == 0


@pytest.mark.parametrize("begin", ["/docker/4f", "/"])
@pytest.mark.parametrize("version", [v1, v2])
def test_a_container_sees_its_own_group_as_the_top(
    version: Callable[[str, str], dict[str, str]], begin: str, tmp_path: Path
) -> None:
    """Docker without a namespace of its own for groups mounts /docker/ID; with one, all is /."""
    files = version(begin, begin)
    cpu, memory = ("sys/fs/cgroup",) * 2 if version is v2 else ("sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory")
    files |= {f"{cpu}/cpu.max": "200000 100000", f"{memory}/memory.max": f"{6 * GB}", f"{memory}/memory.current": "0"}
    files |= {f"{cpu}/cpu.cfs_quota_us": "200000", f"{cpu}/cpu.cfs_period_us": "100000"}
    files |= {f"{memory}/memory.limit_in_bytes": f"{6 * GB}", f"{memory}/memory.usage_in_bytes": "0"}
    root = machine(tmp_path, files)
    assert num_cpus(root) == 2 and free_memory(root) == 6 * GB


def test_a_group_outside_of_what_is_seen_is_as_the_top(tmp_path: Path) -> None:
    for number, group in enumerate(("/../..", "/elsewhere/x")):
        files = v2(group, "/docker/4f") | {"sys/fs/cgroup/cpu.max": "200000 100000\n", "cpu.max": "100000 100000\n"}
        assert num_cpus(machine(tmp_path / str(number), files)) == 2


def test_threads_of_a_matrix_product_do_not_go_on_spinning() -> None:
    """For a tenth of a second by default: a core less for whoever is waited for."""
    code = (
        "import cvlctl, time, numpy as np\n"
        "a = np.ones((500, 500)); a @ a; begin = time.process_time(); time.sleep(0.2)\n"
        "print(time.process_time() - begin)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.03
