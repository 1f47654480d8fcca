"""How much of the improvement of an adapter the formats of `export` retain: our rounding, and rounding to nearest.

    python bench/export.py [--steps 50] [--rows 48] [--cache DIR] [--bases NF4,Q4_1] [--forms q4_0,nvfp4,mxfp4,int4,nf4]
                           [--calibration-tokens 4096]

SmolLM2-135M is fine-tuned on the default data of `finetune`, over a base in NF4 and over the Q4_1 weights of its own
file. The merged weights are then encoded in each format, once to the nearest codes of the format's recipe, and once by
the rounding of `export` (`encode_like`). The losses are those of the held-out examples of the run, with the decoded
weights: the values that the exported file has. Activations are bfloat16 where the processor computes with it.

The base is in another format than the file, so that encoding costs loss even without an adapter. The rows also have
the loss of the encoded base, and that of `export --calibrate` on a text that the merged model has written. The rows
"own" measure the rounding alone: the base is encoded in the format first, and the loss before and that of the unmerged
adapter are measured over this base.

The gain kept is (before - exported) / (before - trained). `--cache` retains the dense base and the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import qlora_app
import qlora_ext
from lib import harness
from qlora_app.data import DEFAULT_DATA, read_examples, split
from qlora_app.exporting.calibrated import encode as encode_calibrated
from qlora_app.models import DEFAULT_MODEL, Loader, load_tokenizer, resolve
from qlora_ext.calibration import self_text
from qlora_ext.checkpoints.compressed_tensors_files import joined_layers
from qlora_ext.dtypes import computing_dtype
from qlora_ext.fidelity import losses_of
from qlora_ext.form import Form
from qlora_ext.merging.codes import encode_like, seed_of
from qlora_ext.merging.layers import Over4bit

# Of the default job: tokens per row, rows to train on and held-out examples.
LENGTH, TRAINED, HELD_OUT = 256, 200, 48
WRITTEN = 512  # tokens of a sequence for the calibration
Weights = Mapping[str, tuple[Tensor, Tensor]]  # before and after merging, by layer


def base_of(name: str, cache: pathlib.Path) -> str:
    """The model over which `finetune` trains in that format: its file is in Q4_1, and dense models become NF4."""
    if name == "Q4_1":
        return DEFAULT_MODEL
    if not (cache / "dense").exists():
        qlora_app.export(model=DEFAULT_MODEL, to="dense", output=cache / "dense")
    return str(cache / "dense")


@dataclasses.dataclass
class Subject:
    """A trained model, whose weights can be replaced."""

    model: Any
    weights: Weights
    rows: list[Any]

    @classmethod
    def of(cls, adapter: pathlib.Path, base: str, count: int) -> Subject:
        source, tokenizer = resolve(base), load_tokenizer(resolve(base))
        rows = split(tokenizer, read_examples(DEFAULT_DATA), LENGTH, TRAINED, HELD_OUT, 0).held_out
        loader = Loader(source, Form(), torch.float32, torch.device("cpu"))
        model = PeftModel.from_pretrained(loader.while_loading(), str(adapter))
        weights = {}
        for name, layer in model.named_modules():
            if isinstance(layer, Over4bit):
                before, after = layer.before_and_after()
                weights[name.removeprefix("base_model.model.")] = before.clone(), after.clone()
        model = model.merge_and_unload().to(computing_dtype(torch.bfloat16, "cpu")).eval()
        return cls(model, weights, list(rows)[:count])

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.model.dtype
        return found

    def take(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.model.get_submodule(name).weight.data = weight.to(self.dtype, copy=True)  # calibrating writes to it

    def calibrated(self, form: str, text: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The merged weights as `export --calibrate` encodes them."""
        self.take((name, after) for name, (_, after) in self.weights.items())
        groups = joined_layers(self.weights) if form == "nvfp4" else ([name] for name in self.weights)
        found, _ = encode_calibrated(self.model, [*groups], Form.named(form), qlora_ext.Calibration(text))
        return ((name, w4.dequantize(torch.float32)) for name, w4 in found.items())

    def text(self, tokens: int) -> Tensor:
        """What the merged model writes."""
        self.take((name, after) for name, (_, after) in self.weights.items())
        return self_text.write(self.model, max(1, tokens // WRITTEN), WRITTEN, seed=0)

    def loss(self, weights: Iterator[tuple[str, Tensor]]) -> float:
        """The held-out loss with these weights."""
        self.take(weights)
        rows = ({key: torch.tensor([list(row[key])]) for key in ("input_ids", "labels")} for row in self.rows)
        return losses_of(self.model, rows).mean().item()


def ours(form: str) -> Callable[[str, Tensor, Tensor], Tensor]:
    def encode(name: str, before: Tensor, after: Tensor) -> Tensor:
        found = encode_like(qlora_ext.quantize(before, form), before, after, seed_of(f"{name}.weight"))
        return found.w4.dequantize(torch.float32)

    return encode


def rows_of(
    subject: Subject, base: str, form: str, losses: tuple[float, float], text: Tensor
) -> Iterator[dict[str, Any]]:
    """The rows of a format: over the base of the training, and over one in the format."""

    def nearest(weight: Tensor) -> Tensor:
        return qlora_ext.quantize(weight, form).dequantize()

    def measured(weights: Weights, encode: Callable[[str, Tensor, Tensor], Tensor]) -> float:
        return subject.loss((name, encode(name, *pair)) for name, pair in weights.items())

    encoded = {name: nearest(before) for name, (before, _) in subject.weights.items()}
    own = {name: (encoded[name], encoded[name] + after - before) for name, (before, after) in subject.weights.items()}
    base_loss = subject.loss(iter(encoded.items()))
    others = (base_loss, measured(own, lambda name, before, after: after))
    for what, weights, (before, best) in ((base, subject.weights, losses), ("own", own, others)):
        found = {
            "nearest": measured(weights, lambda name, before, after: nearest(after)),
            "ours": measured(weights, ours(form)),
        }
        if what == base:
            found["calibrated"] = subject.loss(subject.calibrated(form, text))
        kept = {f"{name}: gain kept": f"{(before - loss) / (before - best):.0%}" for name, loss in found.items()}
        yield {
            "base": what,
            "format": form,
            "before": before,
            "trained": best,
            "encoded base": base_loss,
            **found,
            **kept,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of training (default %(default)s)")
    parser.add_argument("--rows", type=int, default=48, help="held-out examples (default %(default)s)")
    parser.add_argument("--cache", type=pathlib.Path, help="a directory that retains the base and the runs")
    parser.add_argument("--bases", default="NF4,Q4_1", help="default %(default)s")
    parser.add_argument("--forms", default="q4_0,nvfp4,mxfp4,int4,nf4", help="default %(default)s")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="default %(default)s")
    arguments = parser.parse_args()
    report = harness.Report(
        "export",
        "What an adapter learnt, in the formats of export",
        [
            f"{DEFAULT_MODEL}, {arguments.steps} steps of the default job. Losses in nats per learnt token of",
            f"{arguments.rows} held-out examples. Calibrated: on {arguments.calibration_tokens} tokens that the merged",
            "model wrote.",
        ],
    )
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        cache = arguments.cache or pathlib.Path(temporary)
        cache.mkdir(exist_ok=True)
        for base in arguments.bases.split(","):
            model, run = base_of(base, cache), cache / f"run-{base}"
            if not run.exists():
                with torch.enable_grad():
                    qlora_app.finetune(model=model, output=run, max_steps=arguments.steps)
            subject = Subject.of(run / "adapter", model, arguments.rows)
            before, best = (subject.loss((name, pair[i]) for name, pair in subject.weights.items()) for i in (0, 1))
            text = subject.text(arguments.calibration_tokens)
            for form in arguments.forms.split(","):
                for row in rows_of(subject, base, form, (before, best), text):
                    report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
