"""Nsight Compute's counters of our kernels: which part of the card bounds each of ten problems.

    python bench/cuda_ncu.py [--tiny]

Runs this program again under ncu, which needs access to the counters (often root). A row is a kernel. Metrics that this
ncu does not know are named. Writes a section of bench/results/CARD.json.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

METRICS = {
    "dram__bytes_read.sum": "DRAM read",
    "dram__bytes_write.sum": "DRAM written",
    "lts__t_bytes.sum": "L2",
    "l1tex__data_bank_reads.sum": "shared and L1 reads",
    "l1tex__data_bank_writes.sum": "shared and L1 writes",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "shared conflicts",
    "idc__requests.sum": "constant loads",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue active",
    "sm__cycles_elapsed.max": "cycles",
    "gpu__time_duration.sum": "time",
    "launch__waves_per_multiprocessor": "waves",
}
# Operator, N, K and tokens.
PROBLEMS = (
    *(("linear_nf4", 4096, 4096, m) for m in (1, 16, 64, 256, 4096)),
    *(("linear_nf4_dx", 4096, 4096, m) for m in (64, 256, 4096)),
    *(("linear_nf4", 14336, 4096, m) for m in (16, 1024)),
)
TINY = (("linear_nf4", 256, 512, 1), ("linear_nf4_dx", 256, 512, 40))
MARK = "spin_kernel"  # torch's sleep, which stands before each problem


def launch(tiny: bool) -> None:
    """What runs under ncu: each problem once, behind a mark, after a call that is not profiled."""
    import torch

    from lib.cuda_cases import BF16, OPS, Layer

    for operator, n, k, m in TINY if tiny else PROBLEMS:
        layer = Layer(n, k, 1)
        forward = operator == "linear_nf4"
        x = torch.randn(m, k if forward else n, device="cuda", dtype=BF16)
        args = (layer.forward_args if forward else layer.dx_args)(0, x)
        getattr(OPS, operator)(*args)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1)
        getattr(OPS, operator)(*args)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def known(ncu: str) -> list[str]:
    """The metrics that this ncu has for this card. Those of launches are not in its list, and always there."""
    done = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ncu --query-metrics: {(done.stderr + done.stdout).strip()}")
    names = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    return [metric for metric in METRICS if metric.startswith("launch__") or metric.split(".")[0] in names]


def rows(output: str, problems: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Rows from what `ncu --csv --page raw` prints: a line of names, one of units, and a line per kernel."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu printed no table: {output.strip()[-500:]}")
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    at = -1
    for kernel in kernels:
        name = kernel["Kernel Name"]
        if MARK in name:
            at += 1
            continue
        operator, n, k, m = problems[at]
        values = {f"{title} ({units[metric]})" if units[metric] else title: kernel[metric].replace(",", "")
                  for metric, title in METRICS.items() if metric in kernel}  # fmt: skip
        yield {"operator": operator, "N": n, "K": k, "M": m, "kernel": name.split("(")[0][:60], **values}
    if at + 1 != len(problems):
        raise RuntimeError(f"ncu profiled {at + 1} of {len(problems)} problems")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small problems")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch:
        launch(arguments.tiny)
        return
    if (ncu := shutil.which("ncu")) is None:
        sys.exit("ncu is not on PATH (Nsight Compute has it)")
    metrics = known(ncu)
    small = ["--tiny"] if arguments.tiny else []
    options = [
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--profile-from-start",
        "off",
        "--metrics",
        ",".join(metrics),
    ]
    command = [ncu, *options, sys.executable, os.path.abspath(__file__), "--launch", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"ncu: exit status {done.returncode}: {(done.stdout + done.stderr).strip()[-1000:]}")

    from lib.cuda_timing import card_name
    from lib.harness import Report

    report = Report("cuda_ncu", f"Counters of Nsight Compute on {card_name()}")
    unknown = [metric for metric in METRICS if metric not in metrics]
    report.notes.append(f"Not known to this ncu: {', '.join(unknown) or 'none'}.")
    print(report.notes[-1])
    for row in rows(done.stdout, TINY if arguments.tiny else PROBLEMS):
        report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
