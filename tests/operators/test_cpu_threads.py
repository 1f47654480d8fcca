"""Threads: limits of control groups, and how idle threads wait."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import qlora_ext

CPUS = len(os.sched_getaffinity(0))


def machine(root: pathlib.Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``qlora_ext.cpu`` read these files in place of the machine's."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(qlora_ext.cpu, "_ROOT", root)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "none\n", "sys/fs/cgroup/cpu.max": "200000 0\n"}, 64),
        # The limit of a parent applies as well.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "700000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "350000 100000\n",
            },
            4,
        ),
        # A container that sees the host's path, and its own group as the root.
        ({"proc/self/cgroup": "0::/docker/1\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "12:memory:/m\n4:cpu,cpuacct:/docker/1\n0::/\n",
                "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
)
def test_available_cpus(
    files: dict[str, str], expected: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, files, monkeypatch)
    assert qlora_ext.cpu.available_cpus() == expected


@pytest.mark.parametrize("chosen", [None, "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_threads_respect_the_limit(chosen: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}
    machine(tmp_path, files, monkeypatch)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "3")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        qlora_ext.cpu.limit_threads()
        assert torch.get_num_threads() == (2 if chosen is None else 3)
    finally:
        torch.set_num_threads(before)


_WAITING = """
import os, threading, time
import torch, qlora_ext

torch.set_num_threads(2)
ones = torch.ones(1 << 17)

def seconds_of_workers() -> float:
    ticks = 0
    for task in set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}:
        try:
            fields = open(f"/proc/self/task/{task}/stat").read().rpartition(")")[2].split()
        except OSError:  # the thread has ended
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")

def spun() -> float:
    before = seconds_of_workers()
    for _ in range(50):
        ones + 1
        time.sleep(0.01)
    return seconds_of_workers() - before

print(spun())
for policy in ("passive", "passive", "active", "passive"):
    qlora_ext.cpu.set_wait_policy(policy)
    print(spun())
"""


@pytest.mark.skipif(CPUS < 2, reason="threads wait for each other only where there are two CPUs")
def test_wait_policy() -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    }
    ran = subprocess.run([sys.executable, "-c", _WAITING], env=environment, capture_output=True, text=True, check=True)
    default, passive, again, active, last = (float(line) for line in ran.stdout.split())
    assert min(default, active) > 0.05
    assert max(passive, again, last) < min(default, active) / 4


def test_wait_policy_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='policy: expected "active" or "passive", got \'lazy\''):
        qlora_ext.cpu.set_wait_policy("lazy")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(RuntimeError, match="OMP_WAIT_POLICY=active"):
        qlora_ext.cpu.set_wait_policy("passive")
