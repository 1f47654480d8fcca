"""Runs all checks and benches on this machine, and writes a report.

    python bench/run.py [--quick]
    python bench/run.py --device cuda [--minutes 20] [--ncu-minutes 5] [--sanitizer-minutes 10] [--lock-clocks] [--tiny]

On the CPU: the limits of the machine, encoding and decoding, the linear layer, the overhead of eager calls, training
steps, generation and streaming compared with peers, and the cost of 4 bits (hours). `--quick` takes about two minutes,
with few shapes and short timings, and writes to build/bench.

On CUDA, in `--minutes`: rules that the compiled kernels keep, a record of the card, the hardware's rates that the
kernels depend on, every CUDA test, the operators compared with peers, the crossover to the library, every kernel that
can be forced against the one that is chosen, training steps of a Llama and of a mixture of experts, and decoding. Then,
in `--ncu-minutes`, counters if ncu is installed, and in `--sanitizer-minutes`, compute-sanitizer's four tools on a test
of each kernel; those for Hopper run separately and may fail, because compute-sanitizer has reported accesses by wgmma
that are right. Under the kernel simulator nothing is timed; it adds the kernels' counters. `--tiny` runs everything on
small shapes, and writes to build/bench.

A test that hangs or loses its CUDA context is reported, and the others run in a new process. What became of each step
is saved as soon as it has ended, in the section `cuda_run` of the card's results.

Results go to bench/results/, one JSON file per processor or card; `python -m bench.lib.report` makes Markdown and
pictures from them. Peers that are not installed are named. A step that fails, takes too long or cannot run here is
named at the end, the others still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

from lib import cuda_steps, nvidia_smi
from lib import results_files as files
from lib.steps import Result, Step, run_all, summary

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"

CPU_BENCHES = (
    ("ceiling",),
    ("cpu_codec",),
    ("cpu_linear",),
    ("cpu_ragged",),
    ("formats",),
    ("int8_layers",),
    ("eager_overhead",),
    ("step",),
    ("step", "--model", "1b", "--tokens", "1x256"),
    ("decode",),
    ("decode", "--model", "1b"),
    ("streaming",),
    ("quality",),
    ("fidelity",),
    ("activations",),
    ("activations", "--part", "gradients"),
    ("sensitivity",),
    ("troubleshooting",),
)
QUICK_BENCHES = (
    ("ceiling", "--seconds", "1"),
    ("cpu_codec", "--seconds", "0.2"),
    ("cpu_linear", "--seconds", "0.3", "--shapes", "1536x576,4096x4096", "--tokens", "1,16,256"),
    ("step", "--seconds", "2", "--tokens", "1x128"),
)
PEERS = ("bitsandbytes", "torchao", "llama_cpp")


def cpu_steps(quick: bool) -> list[Step]:
    benches = QUICK_BENCHES if quick else CPU_BENCHES
    return [Step(" ".join(words), [sys.executable, str(BENCH / f"{words[0]}.py"), *words[1:]]) for words in benches]


def run_cuda(arguments: argparse.Namespace) -> list[Result]:
    """All steps on the card; the kernel simulator has no limit of time, because a minute of a card is hours there."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # so that nvidia-smi's numbers are CUDA's
    parts = [(arguments.minutes, cuda_steps.steps(arguments.minutes, arguments.tiny))]
    if arguments.ncu_minutes > 0:
        parts.append((arguments.ncu_minutes, cuda_steps.counters(arguments.ncu_minutes, arguments.tiny)))
    if arguments.sanitizer_minutes > 0:
        parts.append((arguments.sanitizer_minutes, cuda_steps.sanitizers()))
    card, results = nvidia_smi.query("name"), list[Result]()
    with contextlib.ExitStack() as stack:
        if arguments.lock_clocks:
            print(stack.enter_context(nvidia_smi.locked_clocks(arguments.lock_clocks)))
        for minutes, steps in parts:
            run_all(steps, None if cuda_steps.SIMULATED else minutes * 60, lambda one: save(card, results, one))
    return results


def save(card: str, results: list[Result], one: Result) -> None:
    """Adds a result, and writes all of them, except under the kernel simulator."""
    results.append(one)
    if cuda_steps.SIMULATED:
        return
    rows = [
        {"step": r.step.name, "result": r.outcome.value, "reason": r.reason, "seconds": round(r.seconds)}
        for r in results
    ]
    section = {"title": f"Steps of bench/run.py on {card}", "notes": [], "machine": {"gpu": card}, "rows": rows}
    files.write_section(files.card_file(card), "cuda_run", section)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="CPU: two minutes, to see what this machine is like")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the CUDA run, roughly (default 20)")
    parser.add_argument("--ncu-minutes", type=float, default=5.0, help="for ncu, at most (default 5; 0: not at all)")
    parser.add_argument(
        "--sanitizer-minutes",
        type=float,
        default=10.0,
        help="for compute-sanitizer, at most (default 10; 0: not at all)",
    )
    parser.add_argument(
        "--lock-clocks", nargs="?", const="default", metavar="MHZ",
        help="lock the card's SM clock during the run (needs root; default: that of applications); never on a card "
        "that others use",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="CUDA: small shapes, to see whether all of it works")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if arguments.tiny if cuda else arguments.quick:
        files.WRITTEN = ROOT / "build" / "bench"
        os.environ["QLORA_BENCH_RESULTS"] = str(files.WRITTEN)
    for peer in PEERS:
        if not importlib.util.find_spec(peer):
            print(f"absent: {peer} is not installed, and is not compared with")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that steps are ended and clocks unlocked
    sys.exit(summary(run_cuda(arguments) if cuda else run_all(cpu_steps(arguments.quick))))


if __name__ == "__main__":
    main()
