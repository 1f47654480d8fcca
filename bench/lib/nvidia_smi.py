"""The card's clocks, power and settings, by nvidia-smi. Where it is missing, every value says so. No torch here."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
from collections.abc import Iterator

MISSING = "unknown: nvidia-smi is not on PATH"
FIELDS = (
    "name", "uuid", "driver_version", "vbios_version", "pci.bus_id", "pstate", "temperature.gpu",
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "clocks.default_applications.graphics",
    "clocks_event_reasons.active", "power.draw", "power.limit", "power.max_limit",
    "ecc.mode.current", "mig.mode.current", "persistence_mode", "compute_mode", "memory.total",
)  # fmt: skip


def device() -> str:
    """The card that CUDA's device 0 is, if CUDA_DEVICE_ORDER is PCI_BUS_ID."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"


def command(*options: str) -> list[str] | None:
    """The command line of nvidia-smi for this card; None where it is missing."""
    program = shutil.which("nvidia-smi")
    return None if program is None else [program, "-i", device(), *options]


def query(field: str) -> str:
    """One property of the card. Fields are asked one by one, because an unknown one fails the whole query."""
    asked = command(f"--query-gpu={field}", "--format=csv,noheader")
    if asked is None:
        return MISSING
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown to this nvidia-smi"


class Clocks:
    """Samples the SM clock in the background, five times per second, until the process ends."""

    def __init__(self) -> None:
        asked = command("--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-lms", "200")
        self._samples: list[float] = []
        self._missing = asked is None
        if asked is not None:
            self._process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._samples.append(float(line))

    def row(self) -> dict[str, object]:
        """A column for a row of results: the median clock since the last row."""
        samples, self._samples = self._samples, []
        if self._missing:
            return {"SM MHz": MISSING}
        return {"SM MHz": statistics.median(samples) if samples else "no sample"}


@contextlib.contextmanager
def locked_clocks(megahertz: str) -> Iterator[str]:
    """Locks the SM clock, and unlocks it at the end. Yields what was done, as a sentence.

    "default" is the card's default clock for applications, or its maximum if it has none.
    """
    if command() is None:
        yield f"clocks are not locked: {MISSING}"
        return
    if megahertz == "default":
        found = (query("clocks.default_applications.graphics"), query("clocks.max.sm"))
        megahertz = next((value.split()[0] for value in found if value[:1].isdigit()), "")
    done = subprocess.run(command("-lgc", megahertz) or [], capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"clocks are not locked: {(done.stdout + done.stderr).strip()}"
        return
    try:
        yield f"SM clock locked at {megahertz} MHz until the end of this run"
    finally:
        subprocess.run(command("-rgc") or [], capture_output=True, check=False)
