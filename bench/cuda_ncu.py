"""Nsight Compute's counters of our kernels: which part of the card bounds each of ten problems.

    python bench/cuda_ncu.py [--tiny] [--minutes 4]

Runs this program again under ncu, which needs access to the counters (often root), once per problem. A row is a kernel.
Metrics that this ncu does not know are named. Writes a section of bench/results/CARD.json after each problem; what does
not fit `--minutes` is named.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from lib.steps import signal_group

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
Problem = tuple[str, int, int, int]


def launch(problem: Problem) -> None:
    """What runs under ncu: a problem once, after a call that is not profiled."""
    import torch

    from lib.cuda_cases import BF16, OPS, Layer

    operator, n, k, m = problem
    layer = Layer(n, k, 1)
    forward = operator == "linear_nf4"
    x = torch.randn(m, k if forward else n, device="cuda", dtype=BF16)
    args = (layer.forward_args if forward else layer.dx_args)(0, x)
    getattr(OPS, operator)(*args)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
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


def rows(output: str, problem: Problem) -> Iterator[dict[str, Any]]:
    """Rows from what `ncu --csv --page raw` prints: a line of names, one of units, and a line per kernel."""
    operator, n, k, m = problem
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu printed no table: {output.strip()[-500:]}")
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    if not kernels:
        raise RuntimeError("ncu profiled no kernel")
    for kernel in kernels:
        name = kernel["Kernel Name"]
        values = {f"{title} ({units[metric]})" if units[metric] else title: kernel[metric].replace(",", "")
                  for metric, title in METRICS.items() if metric in kernel}  # fmt: skip
        yield {"operator": operator, "N": n, "K": k, "M": m, "kernel": name.split("(")[0][:60], **values}


def profiled(ncu: str, metrics: list[str], problem: Problem, seconds: float) -> list[dict[str, Any]]:
    """The rows of a problem, which has so many seconds."""
    options = ["--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    words = ",".join(map(str, problem))
    command = [ncu, *options, "--metrics", ",".join(metrics), sys.executable, os.path.abspath(__file__)]
    command += ["--launch", words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"stopped after {seconds:.0f} s") from None
    finally:
        signal_group(process.pid, signal.SIGKILL)  # also what ncu has started
        process.wait()
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {output.strip()[-1000:]}")
    return list(rows(output, problem))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small problems")
    parser.add_argument("--minutes", type=float, default=4.0, help="what does not fit is reported as not profiled")
    parser.add_argument("--launch", metavar="OPERATOR,N,K,M", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch:
        operator, *sizes = arguments.launch.split(",")
        n, k, m = map(int, sizes)
        launch((operator, n, k, m))
        return
    end = time.monotonic() + arguments.minutes * 60
    if (ncu := shutil.which("ncu")) is None:
        sys.exit("ncu is not on PATH (Nsight Compute has it)")
    metrics = known(ncu)

    from lib.cuda_timing import Failures, card_name
    from lib.harness import Report

    report, failures = Report("cuda_ncu", f"Counters of Nsight Compute on {card_name()}"), Failures()
    unknown = [metric for metric in METRICS if metric not in metrics]
    report.notes.append(f"Not known to this ncu: {', '.join(unknown) or 'none'}.")
    print(report.notes[-1])
    problems = TINY if arguments.tiny else PROBLEMS
    for i, problem in enumerate(problems):
        if (left := end - time.monotonic()) <= 0:
            report.notes.append(f"Time ran out after {i} of {len(problems)} problems.")
            print(report.notes[-1])
            break
        with failures.caught("{} of {} x {}, {} tokens".format(*problem)):
            for row in profiled(ncu, metrics, problem, 2 * left / (len(problems) - i)):
                report.add(**row)
            report.save()
    report.write()
    failures.exit()


if __name__ == "__main__":
    main()
