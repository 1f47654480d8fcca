"""Threads on the CPU: how many the process may use, and how they wait.

torch and the kernels share one pool of threads, OpenMP's. A parallel operator ends when its slowest thread does, and
until then the others wait. They spin by default, which costs nothing on an idle machine. On a busy one, they spin on
cores that the slowest thread, or other processes, could use: then a step takes several times as long as it should.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from pathlib import Path, PurePosixPath

import torch

__all__ = ["available_cpus", "limit_threads", "set_wait_policy"]

_ROOT = Path("/")  # tests replace it
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


def limit_threads() -> None:
    """Gives torch at most as many threads as ``available_cpus()``, unless the environment sets their number.

    torch starts a thread per CPU of the affinity mask, also where a container may use fewer. Those threads would use up
    the container's CPU time early in each period, and all wait for the next one. ``import qlora_ext`` calls this.
    """
    cpus = available_cpus()
    if cpus < torch.get_num_threads() and not any(os.environ.get(name) for name in _CHOSEN_BY):
        torch.set_num_threads(cpus)


def set_wait_policy(policy: str) -> None:
    """Sets how idle threads wait for the next parallel operator, from now on, for all of torch.

    The environment variable ``OMP_WAIT_POLICY`` does the same for a process that has not loaded torch yet.

    Args:
        policy: ``"passive"``: they sleep soon, which leaves the cores to others. A step beside busy programs is 1.2 to
            1.8 times as fast as with ``"active"``, but on an idle machine a step on few tokens takes up to 1.3 times as
            long. ``"active"``: they spin for some milliseconds, which is torch's default.

    Raises:
        ValueError: ``policy`` is neither.
        RuntimeError: torch's OpenMP runtime has no such setting, or ``OMP_WAIT_POLICY`` is set to the opposite.

    Example:
        >>> qlora_ext.cpu.set_wait_policy("passive")
    """
    if policy not in ("active", "passive"):
        raise ValueError(f'policy: expected "active" or "passive", got {policy!r}')
    fixed = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if fixed and fixed != policy:
        raise RuntimeError(f"the environment sets OMP_WAIT_POLICY={fixed}, which applies to the whole process")
    library = _openmp()
    if library is not None and hasattr(library, "kmp_set_blocktime"):  # LLVM's and Intel's
        library.kmp_set_blocktime(0 if policy == "passive" else 200)
    elif library is not None and hasattr(library, "GOMP_parallel"):
        _crowd(library, policy == "passive")
    else:
        raise RuntimeError("torch's OpenMP runtime has no wait policy that can be changed")


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded."""
    for line in _lines("proc/self/maps"):
        path = line.partition("/")[2]
        if any(name in path for name in ("libgomp", "libiomp5", "libomp")):
            return ctypes.CDLL(f"/{path}")
    return None


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
