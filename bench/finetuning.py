"""QLoRA compared with 16-bit LoRA and full fine-tuning: held-out losses for equal steps and data, over seeds and tasks.

    python bench/finetuning.py --model DIR [--steps 40] [--seeds 3]        (a model of bench/lib/small_model.py)

The tasks are texts that the model has not seen: conversations (package chitchat-dataset) and Python's standard library.
LoRA has rank 16 on all linear layers. The learning rate of each method is the better of two with the first seed. All
methods compute in float32 on the CPU, from bfloat16 weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_ext
from lib import harness, small_model, texts
from qlora_ext.calibration import InitLora
from qlora_ext.integrations.peft import initialize_lora

RANK, BATCH = 16, 8
TASKS: dict[str, Callable[[], str]] = {"conversations": texts.conversations, "Python": texts.code}


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def with_lora(model: Any, seed: int, rank: int = RANK) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def calibrated(path: str, text: Tensor, seed: int) -> Any:
    """QLoRA on a base calibrated on the model's kind of text, with an initial adapter for the remaining error."""
    model = qlora_ext.quantize_model(load(path), calibration=text, init_lora=InitLora("svd", RANK))
    adapted = with_lora(model, seed)
    initialize_lora(adapted)
    return adapted


def train(model: Any, ids: Tensor, steps: int, lr: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5)
        batch = small_model.drawn(ids, BATCH, generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    found = [model(input_ids=batch, labels=batch).loss.item() for batch in rows.split(16)]
    return statistics.fmean(found)


def loss_after(model: Any, ids: Tensor, held_out: Tensor, steps: int, lr: float, seed: int) -> float:
    train(model, ids, steps, lr, seed)
    return loss_of(model.eval(), held_out)


def parsed(description: str | None, steps: int) -> argparse.Namespace:
    """The options of benches that train a byte-level model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=steps, help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    return parser.parse_args()


def main() -> None:
    arguments = parsed(__doc__, 40)
    path = arguments.model
    text = small_model.drawn(small_model.split(texts.bible())[0], 48, torch.Generator().manual_seed(7))
    methods: dict[str, tuple[Callable[[int], Any], tuple[float, ...]]] = {
        "full fine-tuning": (lambda seed: load(path), (3e-4, 1e-3)),
        "LoRA, 16 bits": (lambda seed: with_lora(load(path), seed), (1e-3, 3e-3)),
        "QLoRA": (lambda seed: with_lora(qlora_ext.quantize_model(load(path)), seed), (1e-3, 3e-3)),
        "QLoRA, calibrated, SVD": (lambda seed: calibrated(path, text, seed), (1e-3, 3e-3)),
    }
    report = harness.Report(
        "finetuning",
        "QLoRA against LoRA in 16 bits and full fine-tuning",
        [
            "A byte-level model of 3.2 million parameters, trained without quantization (bench/lib/small_model.py), "
            f"rank {RANK},",
            f"{arguments.steps} steps of {BATCH} x {small_model.LENGTH} bytes, {arguments.seeds} seeds. Held-out loss,",
            "in nats per byte: mean and standard deviation over seeds, at the better of two learning rates.",
        ],
    )
    for task, read in TASKS.items():
        ids, held_out = small_model.split(read())
        held_out = held_out[:64]
        report.add(task=task, method="before training", loss=f"{loss_of(load(path), held_out):.4f}")
        for method, (build, rates) in methods.items():
            given = ids, held_out, arguments.steps
            first = {lr: loss_after(build(0), *given, lr, 0) for lr in rates}
            best = min(first, key=lambda lr: first[lr])
            losses = [first[best], *(loss_after(build(seed), *given, best, seed) for seed in range(1, arguments.seeds))]
            spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
            loss = f"{statistics.fmean(losses):.4f} ± {spread:.4f}"
            report.add(task=task, method=method, **{"learning rate": best, "loss": loss})
    report.write()


if __name__ == "__main__":
    main()
