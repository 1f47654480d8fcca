"""Training steps while other processes keep cores busy.

    python bench/busy.py [--busy 1 2] [--tokens 1x128] [--seconds 300] [--threads 2]

Each contender is a process of its own, because a wait policy is one of the process. They take turns: one
runs a step while the others sleep. A busy process runs an endless loop. The model is SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import torch

import qlora_ext
import step as steps
from lib import harness


class Contender(NamedTuple):
    """A contender of bench/step.py, and its policy for ``qlora_ext.cpu.set_wait_policy``."""

    base: str
    wait_policy: str


TORCH_WAITING = "qlora_ext, torch's wait policy"
CONTENDERS = {
    "qlora_ext, automatic, as the command runs it": Contender(steps.OURS, "auto"),
    "qlora_ext, passive wait policy": Contender(steps.OURS, "passive"),
    TORCH_WAITING: Contender(steps.OURS, "active"),
    "dense LoRA": Contender("dense LoRA", "active"),
}
BUSY = [sys.executable, "-c", "while True: pass"]


class Process:
    """A contender's process. A call runs one step."""

    def __init__(self, contender: Contender, path: pathlib.Path, arguments: argparse.Namespace) -> None:
        environment = {key: os.environ[key] for key in os.environ if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        command = [sys.executable, __file__, "--contender", contender.base, "--path", str(path)]
        command += ["--wait-policy", contender.wait_policy]
        command += ["--threads", str(arguments.threads), "--tokens", arguments.tokens, "--dtype", arguments.dtype]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.wait()

    def wait(self) -> None:
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"a contender ended with exit status {self.process.wait()}")

    def __call__(self, _: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait()


def serve(arguments: argparse.Namespace) -> None:
    """Runs a step for each line of standard input."""
    torch.set_num_threads(arguments.threads)
    batch, _ = (int(part) for part in arguments.tokens.split("x"))
    step = steps.Step(arguments.contender, arguments.path, batch, getattr(torch, arguments.dtype))
    qlora_ext.cpu.set_wait_policy(arguments.wait_policy)
    print("ready", flush=True)
    for _ in sys.stdin:
        step(0)
        print("done", flush=True)


def main() -> None:
    parser = harness.parser(__doc__, seconds=300.0)
    parser.add_argument("--busy", type=int, nargs="+", default=[1, 2], help="numbers of busy processes (default: 1 2)")
    parser.add_argument("--tokens", default="1x128", help="batch x sequence length (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"), help="default %(default)s")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--wait-policy", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        serve(arguments)
        return
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    numbers = [0, *arguments.busy]
    found: dict[int, harness.Times] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        steps.prepare("smollm2", path, 16, batch, length)
        processes = {name: Process(contender, path, arguments) for name, contender in CONTENDERS.items()}
        for number in numbers:
            others = [subprocess.Popen(BUSY) for _ in range(number)]
            try:
                time.sleep(0.5)
                found[number] = harness.interleave(processes, seconds=arguments.seconds / len(numbers))
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    report = harness.Report(
        f"busy_{arguments.threads}_threads",
        "Training steps on a busy machine: SmolLM2-135M-Instruct",
        [
            f"{batch} x {length} tokens per step, computed in {arguments.dtype} by {arguments.threads} threads, beside",
            f"{' or '.join(map(str, arguments.busy))} processes that run endless loops. Policies:",
            "`qlora_ext.cpu.set_wait_policy`. Idle: time over that with torch's wait policy, paired by rounds.",
        ],
    )
    for name in processes:
        row: dict[str, object] = {"contender": name, "tokens/s idle": batch * length / found[0].median(name)}
        if name != TORCH_WAITING:
            row["idle: time over torch's waiting"] = found[0].ratio(name, TORCH_WAITING)
        for number in arguments.busy:
            row[f"tokens/s, {number} busy"] = batch * length / found[number].median(name)
            row[f"time over idle, {number} busy"] = found[number].median(name) / found[0].median(name)
        report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
