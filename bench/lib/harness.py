"""Timing and reporting for all benches.

Contenders run interleaved in one process, so that disturbances affect all of them. Ratios are those of times in the
same round: median, 10th and 90th percentile. Operands are rotated through more memory than the caches hold. Outputs go
to a ring, and the process keeps freed memory, because a fresh page costs more than most kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from . import results_files as files

COLD_BYTES = 512 << 20
T = TypeVar("T")

Call = Callable[[int], object]
Timer = Callable[[Call, range], float]


def processor() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}


def processor_name() -> str:
    """Vendor, family and model: amd_25_17; amd_25_17_avx2 if QLORA_CPU_ISA limits it."""
    fields = processor()
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(fields.get("vendor_id", ""), "unknown")
    limit = os.environ.get("QLORA_CPU_ISA", "")
    parts = [vendor, fields.get("cpu family", "x"), fields.get("model", "x"), *([limit] if limit else [])]
    return "_".join(parts)


def machine() -> dict[str, Any]:
    """The properties of the machine on which results depend."""
    import qlora_ext

    info, fields = qlora_ext.build_info(), processor()
    caches = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (cache / "type").read_text().strip()
        if kind != "Instruction":
            caches["L" + (cache / "level").read_text().strip()] = (cache / "size").read_text().strip()
    return {
        "cpu": f"{fields.get('model name', platform.processor())}, family {fields.get('cpu family', '?')} "
        f"model {fields.get('model', '?')}",
        "cores": os.cpu_count(),
        "caches": caches,
        "threads": torch.get_num_threads(),
        "isa": info["cpu_isa"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "qlora_ext": f"{info['version']}, {info['compiler']}",
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def keep_freed_memory() -> None:
    """Makes malloc reuse large blocks instead of returning them to the system, for every contender alike."""
    trim_threshold, mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise RuntimeError("mallopt refused: outputs would be timed with the page faults of fresh memory")


class Ring(list[T]):
    """A ring of operands or outputs: `ring.at(i)`, `ring.put(i, output)`."""

    def at(self, i: int) -> T:
        return self[i % len(self)]

    def put(self, i: int, value: T) -> T:
        self[i % len(self)] = value
        return value


def cold(make: Callable[[], T], bytes_each: int, total: int = COLD_BYTES) -> Ring[T]:
    """A ring of results of make() that is larger than the caches, so that each is cold when it is used again."""
    return Ring(make() for _ in range(max(2, -(-total // bytes_each))))


def wall_clock(call: Call, turns: range) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for i in turns:
        call(i)
    return (time.perf_counter() - start) / len(turns)


def thread_clock(call: Call, turns: range) -> float:
    """CPU seconds per call of this thread, for single-threaded calls on a machine with other processes."""
    start = time.thread_time()
    for i in turns:
        call(i)
    return (time.thread_time() - start) / len(turns)


def cuda_clock(call: Call, turns: range) -> float:
    """Seconds per call on the current CUDA stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in turns:
        call(i)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / len(turns)


def parser(description: str | None, *, seconds: float) -> argparse.ArgumentParser:
    """The argument parser of a bench, with --seconds per measurement and --threads."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=seconds, help="for each measurement (default %(default)s)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    return made


class Spread(NamedTuple):
    """Median, 10th and 90th percentile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    return Spread(*(ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.1, 0.9)))


class Times(dict[str, list[float]]):
    """Seconds per call of each contender, one entry per round."""

    def ratio(self, contender: str, baseline: str) -> Spread:
        """The ratio of the times of two contenders, round by round."""
        return spread([a / b for a, b in zip(self[contender], self[baseline], strict=True)])

    def median(self, contender: str) -> float:
        return spread(self[contender]).median

    def best(self, contender: str) -> float:
        return min(self[contender])


def interleave(
    contenders: Mapping[str, Call],
    *,
    seconds: float = 4.0,
    least_sample: float = 1e-3,
    clock: Timer = wall_clock,
) -> Times:
    """Runs rounds of all contenders for about `seconds`, with the order reversed every other round.

    Each call gets an increasing number, with which it chooses its operands. A sample consists of enough calls to take
    `least_sample` seconds.
    """
    turn = 0
    calls = {}
    for name, call in contenders.items():
        clock(call, range(2))
        calls[name] = max(1, round(least_sample / clock(call, range(2, 4))))
    times = Times({name: [] for name in contenders})
    end = time.perf_counter() + seconds
    order = list(contenders)
    while time.perf_counter() < end or len(times[order[0]]) < 5:
        order.reverse()
        for name in order:
            times[name].append(clock(contenders[name], range(turn, turn + calls[name])))
            turn += calls[name]
    return times


def check_equal(got: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 0.0) -> None:
    """Rejects wrong results: they must be bit-equal, or have a relative error of at most `tolerance`."""
    if tolerance == 0.0:
        good = torch.equal(got, expected)
    else:
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        good = bool(error <= tolerance)
    if not good:
        raise AssertionError(f"{what}: the result is wrong, nothing is timed")


class Report:
    """Rows of one bench, printed as they come and written to a section of this machine's file in bench/results."""

    def __init__(self, name: str, title: str, notes: Sequence[str] = ()) -> None:
        self.name, self.title, self.notes = name, title, list(notes)
        self.rows: list[dict[str, Any]] = []
        self.machine = machine()

    def add(self, **row: Any) -> None:
        """Values: text, numbers or Spread. Printed at once, so that a long bench can be watched."""
        self.rows.append({k: v._asdict() if isinstance(v, Spread) else v for k, v in row.items()})
        print("  ".join(f"{key}: {files.text(value)}" for key, value in self.rows[-1].items()), flush=True)

    def save(self) -> None:
        section = {"title": self.title, "notes": self.notes, "machine": self.machine, "rows": self.rows}
        files.write_section(results_file(), self.name, section)

    def write(self) -> None:
        self.save()
        print("\n".join(["", self.title, "", *files.table(self.rows)]))


def results_file() -> Path:
    """Where this machine's results are written: a file named after the card, the kernel simulator or the processor."""
    if "CUDASIM_TORCH_LIBRARY" in os.environ:
        name = files.SIMULATOR
    elif torch.cuda.is_available():
        return files.card_file(torch.cuda.get_device_name())
    else:
        name = processor_name()
    return files.WRITTEN / f"{name}.json"
