"""Runs all checks and benches on this machine, and writes a report.

    python bench/run.py [--quick]
    python bench/run.py --device cuda [--minutes 10] [--tiny]

On the CPU: the limits of the machine, encoding and decoding, the linear layer, training steps, generation and streaming
compared with peers, and the cost of 4 bits (hours). `--quick` takes about two minutes, with few shapes and short
timings, and writes to build/bench.

On CUDA, in about ten minutes: the strict tests of the linear layers, compute-sanitizer's four tools on some of them,
the operators compared with peers (captured into CUDA graphs), and the crossover to the library, which gives a row for
cuda/tuning/library.h. Under the kernel simulator, also the kernels' counters.

Results go to bench/results/, one JSON file per processor or card; `python -m bench.lib.report` makes Markdown and
pictures from them. Peers that are not installed are named. A step that fails or takes too long is named at the end, the
others still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
TESTS = ROOT / "tests" / "cuda"
SIMULATED = "CUDASIM_TORCH_LIBRARY" in os.environ  # where a minute of a card is more than an hour
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SLICE = "test_dropout_in_every_tile or test_a_long_sum"  # every tile, splits and their tickets, dropout


CPU_BENCHES = (
    ("ceiling",),
    ("cpu_codec",),
    ("cpu_linear",),
    ("cpu_ragged",),
    ("formats",),
    ("step",),
    ("step", "--model", "1b", "--tokens", "1x256"),
    ("decode",),
    ("decode", "--model", "1b"),
    ("streaming",),
    ("quality",),
    ("fidelity",),
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


@dataclasses.dataclass
class Step:
    """A program, and the share of the time that it may use."""

    name: str
    command: list[str]
    share: float = 1.0
    missing: str | None = None  # why it cannot run here


def python(script: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(script), *arguments]


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "cuda", *arguments]


def cuda_steps(minutes: float, tiny: bool) -> list[Step]:
    small = ["--tiny"] if tiny else []
    strict = [str(path) for path in sorted(TESTS.glob("test_linear*cuda.py"))]
    steps = [Step("strict tests", pytest(*strict), 0.25)]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS:
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command = [sanitizer or "", *options, *pytest(str(TESTS / "test_linear_cuda.py"), "-k", SLICE)]
        missing = None if sanitizer else "compute-sanitizer is not on PATH (the CUDA toolkit has it)"
        steps.append(Step(f"compute-sanitizer {tool}", command, 0.08, missing))
    crossover = python(BENCH / "cuda_crossover.py", "--minutes", f"{0.2 * minutes:.2f}", *small)
    operators = python(BENCH / "cuda_operators.py", "--minutes", f"{0.5 * minutes:.2f}", *small)
    steps += [Step("crossover", crossover, 0.4), Step("operators and peers", operators, 0.9)]
    return [*steps, Step("work counters", python(BENCH / "cuda_counters.py"))] if SIMULATED else steps


def cpu_steps(quick: bool) -> list[Step]:
    benches = QUICK_BENCHES if quick else CPU_BENCHES
    return [Step(" ".join(words), python(BENCH / f"{words[0]}.py", *words[1:])) for words in benches]


def run(step: Step, seconds: float | None) -> str | None:
    """The reason why the step failed; None if it passed."""
    if step.missing is not None:
        return f"not run: {step.missing}"
    try:
        status = subprocess.run(step.command, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return None if status == 0 else f"exit status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="CPU: two minutes, to see what this machine is like")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the CUDA run, roughly (default 10)")
    parser.add_argument("--tiny", action="store_true", help="CUDA: two small shapes, to see whether all of it works")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    steps = cuda_steps(arguments.minutes, arguments.tiny) if cuda else cpu_steps(arguments.quick)
    if arguments.quick and not cuda:
        os.environ["QLORA_BENCH_RESULTS"] = str(ROOT / "build" / "bench")
    for peer in PEERS:
        if not importlib.util.find_spec(peer):
            print(f"absent: {peer} is not installed, and is not compared with")
    start, failed = time.perf_counter(), []
    for step in steps:
        print(f"\n== {step.name} ({time.perf_counter() - start:.0f} s)", flush=True)
        seconds = step.share * arguments.minutes * 60 if cuda and not SIMULATED else None
        if (why := run(step, seconds)) is not None:
            failed.append(f"{step.name}: {why}")
            print(failed[-1], flush=True)
    print(f"\n== {len(steps) - len(failed)} of {len(steps)} steps passed in {time.perf_counter() - start:.0f} s")
    for line in failed:
        print(f"   {line}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
