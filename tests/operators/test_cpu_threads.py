"""Threads: limits of control groups, and how idle threads wait."""

from __future__ import annotations

import os
import pathlib
import re
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
import ctypes, os, pathlib, shutil, tempfile, threading, time
import torch, qlora_ext

torch.set_num_threads(2)
# Another OpenMP runtime, as other packages bring along. The policy must be that of torch's.
with tempfile.TemporaryDirectory() as directory:
    for runtime in (pathlib.Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(shutil.copy(runtime, f"{directory}/libgomp-copy.so.1"))
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
for policy in ("passive", "passive", "active", "auto", "passive"):
    qlora_ext.cpu.set_wait_policy(policy)
    print(spun())
"""


@pytest.mark.skipif(CPUS < 2, reason="threads wait for each other only where there are two CPUs")
def test_wait_policy() -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    }
    ran = subprocess.run([sys.executable, "-c", _WAITING], env=environment, capture_output=True, text=True, check=True)
    default, passive, again, active, auto, last = (float(line) for line in ran.stdout.split())
    assert min(default, active) > 0.03
    assert auto > 0.0
    assert max(passive, again, last) < min(default, active) / 4


def test_auto_is_passive_while_threads_wait_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads wait for 0.4 of a CPU, then for none, then for 0.1, which changes nothing."""
    switched: list[tuple[int, bool]] = []
    watcher = qlora_ext.cpu._Watcher(lambda passive: switched.append((period, passive)))
    period, clock, delays = 0, 0.0, {"1": 0, "2": 0}
    waits = [0.0, 0.0, 0.4, 0.1, *[0.0] * watcher.CALM_PERIODS, 0.1, 0.1]

    def wait(timeout: float) -> bool:
        nonlocal period, clock
        if period == len(waits):
            return True
        clock += timeout
        delays["2"] += int(waits[period] * timeout * 1e9)
        delays.pop("1", None)  # a thread that ends
        period += 1
        return False

    monkeypatch.setattr(qlora_ext.cpu, "_run_delays", lambda: dict(delays))
    monkeypatch.setattr(qlora_ext.cpu.time, "monotonic", lambda: clock)
    monkeypatch.setattr(watcher.ended, "wait", wait)
    watcher.run()
    assert switched == [(3, True), (4 + watcher.CALM_PERIODS, False)]


def test_run_delays(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"proc/self/task/7/schedstat": "5 30 1\n", "proc/self/task/8/stat": "the thread has ended"}
    machine(tmp_path, files, monkeypatch)
    assert qlora_ext.cpu._run_delays() == {"7": 30}


@pytest.mark.parametrize(
    ("threads", "quota", "chosen", "expected"),
    [
        (64, None, None, "64 of 128 CPUs (the CPU affinity)"),
        (3, "300000", None, "3 of 128 CPUs (a limit on CPU time)"),
        (3, None, "3", "3 of 128 CPUs (OMP_NUM_THREADS)"),
        (32, None, None, "32 of 128 CPUs (torch's number of threads)"),
    ],
)
def test_describe_threads(
    threads: int, quota: str | None, chosen: str | None, expected: str, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    files = {"proc/self/cgroup": "0::/\n"} | ({"sys/fs/cgroup/cpu.max": f"{quota} 100000\n"} if quota else {})
    machine(tmp_path, files, monkeypatch)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert qlora_ext.cpu.describe_threads() == expected


_DELAYED = """
import os, subprocess, sys
import torch
from samples import linear_sample

torch.set_num_threads(1)
s = linear_sample(300, 300, 320, 8)
dy = torch.randn(300, 300)

def results() -> list[torch.Tensor]:
    y = torch.ops.qlora.linear_nf4(*s.args)
    dx = torch.ops.qlora.linear_nf4_dx(*s.dx_args(dy))
    return [y, dx, *torch.ops.qlora.linear_nf4_dlora(dy, s.x, *s.lora_args)]

one = results()
before = set(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
torch.ones(1 << 17) + 1
workers = sorted(set(os.listdir("/proc/self/task")) - before)
cpu = min(os.sched_getaffinity(0))
os.setpriority(os.PRIO_PROCESS, int(workers[0]), 10)
os.sched_setaffinity(int(workers[0]), {cpu})
busy = subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", "while True: pass"])
try:
    for _ in range(2):
        print(all(torch.equal(a, b) for a, b in zip(results(), one, strict=True)))
finally:
    busy.kill()
    busy.wait()
"""


def test_a_delayed_thread_does_not_change_a_bit() -> None:
    """One thread gets about a tenth of a CPU that another process uses, so that the others take its work."""
    lib = pathlib.Path(__file__).parents[1] / "lib"
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join([str(lib), *sys.path])}
    environment.pop("OMP_NUM_THREADS", None)
    ran = subprocess.run([sys.executable, "-c", _DELAYED], env=environment, capture_output=True, text=True, check=False)
    assert (ran.stdout.split(), ran.stderr) == (["True"] * 2, "")


def test_wait_policy_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='policy: expected "active", "passive" or "auto", got \'lazy\''):
        qlora_ext.cpu.set_wait_policy("lazy")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(RuntimeError, match="OMP_WAIT_POLICY=active"):
        qlora_ext.cpu.set_wait_policy("passive")


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_the_environment_sets_the_default_wait_policy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(qlora_ext.cpu, "set_wait_policy", chosen.append)
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(variable, raising=False)
    qlora_ext.cpu.set_default_wait_policy()
    assert chosen == ["auto"]
    monkeypatch.setenv(name, "1000")
    qlora_ext.cpu.set_default_wait_policy()
    assert chosen == ["auto"]


def test_the_command_sets_the_wait_policy() -> None:
    code = "import sys, qlora_app.__main__ as c; sys.argv[1:] = ['info']; c.main(); "
    code += "import qlora_ext; print(qlora_ext.cpu._watcher is not None)"
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "True"
    assert re.search(r"^cpu threads +\d+ of \d+ CPUs \(.+\)$", ran.stdout, re.MULTILINE)
