"""Rates of the hardware on which the kernels' plans depend, measured by a small program that nvcc compiles here.

    python bench/cuda_micro.py [--tiny]

Constant loads of 32 addresses, shared loads of 16 bytes with 4 equal lanes, bytes that TMA brings from L2 to the SMs
with and without multicast, and how many clusters run at once. Writes a section of bench/results/CARD.json. Under the
kernel simulator the program runs with little work, and only clusters are reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lib.cuda_timing import NOT_MEASURED, SIMULATED, card_name
from lib.harness import Report
from lib.nvidia_smi import Clocks

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "bench" / "cuda_micro.cu"
PROGRAM = ROOT / "build" / "bench" / "cuda_micro"


def compile_command(arch: int, program: Path = PROGRAM) -> list[str]:
    """nvcc's command line. The kernel simulator needs PTX, and the runtime as a library that it can replace."""
    name = f"{arch}a" if arch >= 90 else f"{arch}"  # TMA's multicast is fast only with the suffix
    flags = ["-std=c++17", "-O3", f"-I{ROOT}", f"-gencode=arch=compute_{name},code=[sm_{name},compute_{name}]"]
    return ["nvcc", *flags, *(["-cudart=shared"] if SIMULATED else []), str(SOURCE), "-o", str(program)]


def rows(what: str) -> list[dict[str, object]]:
    """What the program prints: "clusters" or "all". Raises RuntimeError if it cannot be compiled or run."""
    if shutil.which("nvcc") is None:
        raise RuntimeError("nvcc is not on PATH")
    major, minor = torch.cuda.get_device_capability()
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    mode = "tiny" if SIMULATED and what == "all" else what
    for command in (compile_command(10 * major + minor), [str(PROGRAM), mode]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{Path(command[0]).name}: {(done.stderr + done.stdout).strip()}")
    found: list[dict[str, object]] = [json.loads(line) for line in done.stdout.splitlines()]
    counts = lambda row: row["unit"] == "clusters"  # noqa: E731
    return [row if counts(row) or not SIMULATED else {**row, "value": NOT_MEASURED} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="accepted like in the other benches; it is short anyway")
    parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    report = Report(
        "cuda_micro", f"Rates of the hardware of {card_name()}", [" ".join(__doc__.split("\n\n")[2].split())]
    )
    clocks = Clocks()
    found = rows("all")
    clock = clocks.row()
    for row in found:
        report.add(**row, **clock)
    if not SIMULATED:
        report.write()


if __name__ == "__main__":
    main()
