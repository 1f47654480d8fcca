"""How much of an adapter's improvement is retained after merging it into 4 bits.

    python bench/merging.py --model DIR [--steps 30] [--seeds 3]        (a model of bench/lib/small_model.py)

A byte-level model is fine-tuned on conversations that it has not seen (package chitchat-dataset). The adapter is merged
into 4 bits in four ways: by rounding to the nearest codes under new scales, as merging and quantizing would; by
`merge_to_4bit`; by `merge_calibrated` on 48 rows of the training text; and by `merge_to_4bit` after merge-aware
training (`set_merge_aware`). The result is the share of the held-out improvement that is retained: mean and minimum
over seeds.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch

import finetuning
import qlora_ext
from lib import harness, small_model, texts
from qlora_ext.calibration import Calibration
from qlora_ext.integrations.peft import merge_calibrated, merge_to_4bit, set_merge_aware

RANKS, RATES = (4, 16, 64), (3e-5, 3e-4)


def adapted(path: str, rank: int, seed: int) -> Any:
    return finetuning.with_lora(qlora_ext.quantize_model(finetuning.load(path)), seed, rank)


def nearest(model: Any) -> Any:
    return qlora_ext.quantize_model(model.merge_and_unload())


def main() -> None:
    arguments = finetuning.parsed(__doc__, 30)
    ids, held_out = small_model.split(texts.conversations())
    held_out = held_out[:48]
    learnt = small_model.drawn(ids, 48, torch.Generator().manual_seed(7))
    ways = {
        "nearest": nearest,
        "merge_to_4bit": lambda model: merge_to_4bit(model)[0],
        "merge_calibrated": lambda model: merge_calibrated(model, Calibration(learnt)),
    }
    before = finetuning.loss_of(qlora_ext.quantize_model(finetuning.load(arguments.model)), held_out)
    report = harness.Report(
        "merging",
        "What an adapter learnt, merged into 4 bits",
        [
            f"Share of the held-out gain that remains, mean (minimum) over {arguments.seeds} seeds; 1 is the unmerged",
            "adapter. A byte-level model trained without quantization (bench/lib/small_model.py),",
            f"{arguments.steps} steps of {finetuning.BATCH} x {small_model.LENGTH} bytes of conversations; the loss",
            f"before training is {before:.4f} nats per byte.",
        ],
    )
    for rank in RANKS:
        for lr in RATES:
            left: dict[str, list[float]] = {name: [] for name in (*ways, "merge-aware")}
            gains = []
            for seed in range(arguments.seeds):
                model = adapted(arguments.model, rank, seed)
                finetuning.train(model, ids, arguments.steps, lr, seed)
                gain = before - finetuning.loss_of(model.eval(), held_out)
                gains.append(gain)
                aware = adapted(arguments.model, rank, seed)
                set_merge_aware(aware)
                finetuning.train(aware, ids, arguments.steps, lr, seed)
                merged = {name: merge(copy.deepcopy(model)) for name, merge in ways.items()}
                merged["merge-aware"] = merge_to_4bit(aware.eval())[0]
                for name, other in merged.items():
                    left[name].append((before - finetuning.loss_of(other, held_out)) / gain)
            shares = {name: f"{statistics.fmean(of):.3f} ({min(of):.3f})" for name, of in left.items()}
            report.add(rank=rank, **{"learning rate": lr, "gain": statistics.fmean(gains)}, **shares)
    report.write()


if __name__ == "__main__":
    main()
