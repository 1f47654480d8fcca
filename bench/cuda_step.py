"""Training steps of a stack of Llama blocks, or of a block of experts: speed, peak memory and loss, beside the others.

    python bench/cuda_step.py llama|experts [--minutes 1] [--tiny] [--device cuda|cpu]

llama: 8 layers with Llama 3 8B's shapes; experts: one layer with Mixtral's. Random weights, PEFT's LoRA of rank 16 on
all linear layers and experts, gradient checkpointing, AdamW. The contenders are our layers, bitsandbytes with PEFT, and
bf16 LoRA, one after the other, on the same weights, adapters and tokens. The losses after 20 steps are compared: a
bench whose contenders learn different things fails. Peak memory is torch's, of the steps. Writes a section of
bench/results/CARD.json. Under the kernel simulator, and on the CPU, everything runs but nothing is timed or written.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from typing import Any

import torch

from lib.cuda_models import DENSE, OURS, RANK, THEIRS, adapted, contenders
from lib.cuda_timing import NOT_MEASURED, SIMULATED, Failures, card_name
from lib.harness import Report, Spread, spread
from lib.nvidia_smi import Clocks

STEPS, WARM_UP, BATCHES = 20, 3, 4
TOKENS, TINY_TOKENS = (4, 1024), (2, 8)  # rows and their length
RATE = 1e-3
# Both 4-bit bases have the same bits; the dense one lacks the error of 4 bits.
NEAR = {THEIRS: 1e-2, DENSE: 0.1}


class Training:
    """One contender. A call is a step; it returns the loss before it."""

    def __init__(self, contender: str, kind: str, tiny: bool, device: str) -> None:
        model = adapted(contender, kind, tiny, device)
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise RuntimeError(f"{contender}: no adapter was made")
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)
        generator = torch.Generator().manual_seed(0)
        rows, length = TINY_TOKENS if tiny else TOKENS
        shape = (BATCHES, rows, length)
        self.batches = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
        self.tokens, self.steps = rows * length, 0

    def __call__(self) -> torch.Tensor:
        ids = self.batches[self.steps % BATCHES]
        self.steps += 1
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def timed(training: Training, seconds: float) -> Spread:
    """Seconds per step, of at least five steps."""
    samples: list[float] = []
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 5:
        start = time.perf_counter()
        training()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return spread(samples)


def measure(contender: str, kind: str, tiny: bool, device: str, seconds: float) -> tuple[dict[str, Any], float | None]:
    """A row of the table, and the median time of a step."""
    training = Training(contender, kind, tiny, device)
    is_timed = device == "cuda" and not SIMULATED
    clocks = Clocks() if is_timed else None
    if is_timed:
        torch.cuda.reset_peak_memory_stats()
    losses = [float(training()) for _ in range(STEPS)]
    row: dict[str, Any] = {"base": contender, "loss at first": losses[0], f"loss after {STEPS} steps": losses[-1]}
    if clocks is None:
        return {**row, "tokens/s": NOT_MEASURED, "peak GB": NOT_MEASURED}, None
    row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    clocks.row()
    step = timed(training, seconds)
    return {**row, "tokens/s": training.tokens / step.median, "seconds per step": step, **clocks.row()}, step.median


def check_losses(rows: dict[str, dict[str, Any]]) -> None:
    """Raises AssertionError unless every contender has learnt, and about the same as ours."""
    last = {name: float(row[f"loss after {STEPS} steps"]) for name, row in rows.items()}
    for name, row in rows.items():
        if not last[name] < row["loss at first"]:
            raise AssertionError(
                f"{name} has learnt nothing: the loss went from {row['loss at first']} to {last[name]}"
            )
        if name != OURS and abs(last[name] - last[OURS]) > NEAR[name] * last[OURS]:
            raise AssertionError(f"the losses after {STEPS} steps differ: {OURS} {last[OURS]}, {name} {last[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("llama", "experts"))
    parser.add_argument("--tiny", action="store_true", help="a small model: does it work at all")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test this program")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: bench/step.py times the CPU")
    card = card_name() if arguments.device == "cuda" else "the CPU"
    report = Report(
        f"cuda_step_{arguments.kind}",
        f"A training step on {card}: {arguments.kind}",
        [
            f"LoRA of rank {RANK}; {' x '.join(map(str, TOKENS))} tokens per step.",
            *__doc__.split("\n\n")[2].splitlines(),
        ],
    )
    names = contenders(arguments.kind)
    if THEIRS not in names:
        report.notes.append("bitsandbytes is not compared: it is not installed, or has no experts.")
        print(report.notes[-1])
    seconds = 0.5 * arguments.minutes * 60 / len(names)
    rows: dict[str, dict[str, Any]] = {}
    ours: float | None = None
    failures = Failures()
    for name in names:
        with failures.caught(name):
            row, step = measure(name, arguments.kind, arguments.tiny, arguments.device, seconds)
            ours = step if name == OURS else ours
            rows[name] = row
            report.add(**row, **({"time over qlora_ext's": step / ours} if step and ours else {}))
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if arguments.device == "cuda" and not SIMULATED:
        report.write()
    if OURS in rows:
        with failures.caught("losses"):
            check_losses(rows)
    failures.exit()


if __name__ == "__main__":
    main()
