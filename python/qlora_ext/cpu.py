"""Threads on the CPU: how many the process may use, and how they wait.

torch and the kernels share one pool of threads, OpenMP's. A parallel operator ends when its slowest thread does, and
until then the others wait. They spin by default, which costs nothing on an idle machine. On a busy one, they spin on
cores that the slowest thread, or other processes, could use: then a step takes several times as long as it should.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch

__all__ = ["available_cpus", "describe_threads", "limit_threads", "set_default_wait_policy", "set_wait_policy"]

_ROOT = Path("/")  # tests replace it
_THREADS_AT_IMPORT = torch.get_num_threads()
# A user who sets one of these has chosen the number of threads.
_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def available_cpus() -> int:
    """The number of CPUs that the process may use, at least 1.

    These are the CPUs of its affinity mask, or less if a control group (a container's ``--cpus``, systemd's
    ``CPUQuota``) limits its CPU time. A limit of 1.5 CPUs counts as 2.

    Example:
        >>> torch.set_num_threads(qlora_ext.cpu.available_cpus())
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """The CPUs that the control groups of the process allow it, from its own group up to the root."""
    quotas = []
    for line in _lines("proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ["sys/fs/cgroup"] if not controllers else ["sys/fs/cgroup/cpu", f"sys/fs/cgroup/{controllers}"]
        # In a container, the path may be the host's, and the container's own group is what is mounted.
        path = PurePosixPath(group.lstrip("/"))
        for mount in mounts:
            for at in dict.fromkeys([path, *path.parents, PurePosixPath()]):
                quotas += _quota(f"{mount}/{at}")
    return quotas


def _quota(group: str) -> list[float]:
    """The limit of a control group, in version 2 (``cpu.max``) or 1. Empty if it has none."""
    lines = _lines(f"{group}/cpu.max")
    words = lines[0].split() if lines else []
    if not words:
        words = [line for name in ("quota", "period") for line in _lines(f"{group}/cpu.cfs_{name}_us")]
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):  # "max" or -1: no limit
        return []
    return [int(words[0]) / int(words[1])]


def _lines(path: str) -> list[str]:
    try:
        return (_ROOT / path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _entries(path: str) -> list[str]:
    try:
        return os.listdir(_ROOT / path)
    except OSError:
        return []


def limit_threads() -> None:
    """Gives torch at most as many threads as ``available_cpus()``, unless the environment sets their number.

    torch starts a thread per CPU of the affinity mask, also where a container may use fewer. Those threads would use up
    the container's CPU time early in each period, and all wait for the next one. The first 4-bit layer calls this.
    """
    cpus = available_cpus()
    if cpus < torch.get_num_threads() and not any(os.environ.get(name) for name in _CHOSEN_BY):
        torch.set_num_threads(cpus)


@functools.cache
def limit_threads_once() -> None:
    """``limit_threads`` at the first call in the process, unless the program has set the number of threads itself."""
    if torch.get_num_threads() == _THREADS_AT_IMPORT:
        limit_threads()


def describe_threads() -> str:
    """How many threads torch uses, and what sets their number: "2 of 64 CPUs (a limit on CPU time)"."""
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    available = available_cpus()
    chosen = [name for name in _CHOSEN_BY if os.environ.get(name)]
    if chosen:
        why = chosen[0]
    elif threads == available < affinity:
        why = "a limit on CPU time"
    elif threads == affinity < cpus:
        why = "the CPU affinity"
    elif threads == cpus:
        why = "all"
    else:
        why = "torch's number of threads"  # such as one per core with two hardware threads
    return f"{threads} of {cpus} CPUs ({why})"


def set_default_wait_policy() -> None:
    """Sets the policy ``"auto"`` where it is supported, unless the environment sets how OpenMP waits."""
    if not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        with contextlib.suppress(RuntimeError):
            set_wait_policy("auto")


def set_wait_policy(policy: str) -> None:
    """Sets how idle threads wait for the next parallel operator, from now on, for all of torch.

    The environment variable ``OMP_WAIT_POLICY`` does the same for a process that has not loaded torch yet.

    Args:
        policy: ``"passive"``: they sleep soon, which leaves the cores to others. A step beside busy programs is 1.2 to
            1.8 times as fast as with ``"active"``, but on an idle machine a step on few tokens takes up to 1.3 times as
            long. ``"active"``: they spin for some milliseconds, which is torch's default. ``"auto"``: passive while
            threads of this process have to wait for CPUs, because other programs or too many threads use them, and
            otherwise active. A thread watches this, on Linux. The command ``qlora-ext`` sets it, unless the environment
            has a policy.

    Raises:
        ValueError: ``policy`` is none of these.
        RuntimeError: torch's OpenMP runtime has no such setting, or ``OMP_WAIT_POLICY`` is set to another policy.

    Example:
        >>> qlora_ext.cpu.set_wait_policy("auto")
    """
    global _watcher
    if policy not in ("active", "passive", "auto"):
        raise ValueError(f'policy: expected "active", "passive" or "auto", got {policy!r}')
    fixed = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if fixed and fixed != policy:
        raise RuntimeError(f"the environment sets OMP_WAIT_POLICY={fixed}, which applies to the whole process")
    sleep_soon = _switch()
    if _watcher is not None:
        _watcher.end()
        _watcher = None
    sleep_soon(policy == "passive")
    if policy == "auto":
        _watcher = _Watcher(sleep_soon)
        _watcher.start()


def _switch() -> Callable[[bool], None]:
    """The function that makes idle threads sleep soon (True) or spin."""
    # Symbols are looked up in torch's library and what it depends on. The process may have other OpenMP runtimes.
    library = ctypes.CDLL(torch._C.__file__)
    if hasattr(library, "kmp_set_blocktime"):  # LLVM's and Intel's
        return lambda passive: library.kmp_set_blocktime(0 if passive else 200)
    if hasattr(library, "GOMP_parallel"):
        return lambda passive: _crowd(library, passive)
    raise RuntimeError("torch's OpenMP runtime has no wait policy that can be changed")


class _Watcher(threading.Thread):
    """Sets the passive policy while threads of this process wait for CPUs, and otherwise the active one."""

    PERIOD = 0.25  # seconds
    # CPUs whose time the threads spend waiting, on average: from the first on, the policy becomes passive, and below
    # the second for some periods, active.
    MANY, FEW, CALM_PERIODS = 0.15, 0.05, 8

    def __init__(self, sleep_soon: Callable[[bool], None]) -> None:
        super().__init__(name="qlora_ext wait policy watcher", daemon=True)
        self.sleep_soon = sleep_soon
        self.ended = threading.Event()

    def run(self) -> None:
        passive, calm, before, delays = False, 0, time.monotonic(), _run_delays()
        while not self.ended.wait(self.PERIOD):
            now, new_delays = time.monotonic(), _run_delays()
            waited = sum(delay - delays.get(task, 0) for task, delay in new_delays.items()) / 1e9 / (now - before)
            before, delays = now, new_delays
            calm = calm + 1 if waited < self.FEW else 0
            if passive != (waited > self.MANY if not passive else calm < self.CALM_PERIODS):
                passive = not passive
                self.sleep_soon(passive)

    def end(self) -> None:
        self.ended.set()
        self.join()


_watcher: _Watcher | None = None


def _run_delays() -> dict[str, int]:
    """For each thread of the process, the nanoseconds for which it was ready to run, but had no CPU."""
    delays = {}
    for task in _entries("proc/self/task"):
        fields = " ".join(_lines(f"proc/self/task/{task}/schedstat")).split()
        if len(fields) == 3:  # the thread has not ended
            delays[task] = int(fields[1])
    return delays


_crowded: threading.Event | None = None


def _crowd(gomp: ctypes.CDLL, passive: bool) -> None:
    """Starts or ends threads that only sleep.

    libgomp has no function for its wait policy. It spins for a moment only while it has more threads than there are
    CPUs (the manual says so under ``GOMP_SPINCOUNT``), so for the passive policy one sleeping thread has a pool of
    sleeping threads of its own.
    """
    global _crowded
    if passive == (_crowded is not None):
        return
    if _crowded is not None:
        _crowded.set()
        _crowded = None
        return
    started, ended = threading.Event(), threading.Event()

    def sleep() -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer
        gomp.GOMP_parallel(nothing, None, gomp.omp_get_num_procs() + 1, 0)
        started.set()
        ended.wait()

    threading.Thread(target=sleep, name="qlora_ext wait policy", daemon=True).start()
    started.wait()
    _crowded = ended
