"""How much of the improvement of an adapter the formats of `export` retain: our rounding, and rounding to nearest.

    python bench/export.py [--steps 50] [--rows 48] [--cache DIR] [--bases NF4,Q4_1] [--forms q4_0,nvfp4,mxfp4,int4,nf4]

SmolLM2-135M is fine-tuned on the default data of `finetune`, over a base in NF4 and over the Q4_1 weights of its own
file. The merged weights are then encoded in each format, once to the nearest codes of the format's recipe, and once by
the rounding of `export` (`encode_like`). The losses are those of the held-out examples of the run, with the decoded
weights: the values that the exported file has. Activations are bfloat16.

The base is in another format than the file, so that encoding costs loss even without an adapter; the loss of the
encoded base is given beside. The rows "own" measure the rounding alone: the base is encoded in the format first, and
the loss before and that of the unmerged adapter are measured over this base.

The gain kept is (before - exported) / (before - trained). `--cache` retains the base and the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import qlora_ext
from lib import harness
from qlora_ext.cli import main as command
from qlora_ext.cli.data import DEFAULT_DATA, read_examples, split
from qlora_ext.cli.exporting.weights import Encoder, before_and_after, layers_by_name
from qlora_ext.cli.models import DEFAULT_MODEL
from qlora_ext.cli.models.adapted import find_adapted
from qlora_ext.cli.training.settings import Settings
from qlora_ext.cli.training.trainer import held_out_loss
from qlora_ext.form import Form
from qlora_ext.integrations.peft.merge import Over4bit
from qlora_ext.merged import seed_of

BATCH = 4
Weights = Mapping[str, tuple[Tensor, Tensor]]  # before and after merging, by layer


def trained(base: str, steps: int, cache: pathlib.Path) -> pathlib.Path:
    """A run over the base in that format."""
    model, run = DEFAULT_MODEL, cache / f"run-{base}"
    if base == "NF4":
        model = str(cache / "NF4")
        if not (cache / "NF4").exists():
            assert command(["quantize", "--model", DEFAULT_MODEL, "--output", model]) == 0
    if not run.exists():
        qlora_ext.finetune(model=model, output=run, max_steps=steps)
    return run


@dataclasses.dataclass
class Subject:
    """A trained model, whose weights can be replaced."""

    model: Any
    weights: Weights
    rows: list[Any]

    @classmethod
    def of(cls, run: pathlib.Path, base: str, count: int) -> Subject:
        arguments = argparse.Namespace(
            adapter=str(run), model=str(run.parent / "NF4") if base == "NF4" else DEFAULT_MODEL, dtype="float32",
            device="cpu", force=False, trust_remote_code=False,
        )  # fmt: skip
        adapted, s = find_adapted(arguments), Settings()
        examples = read_examples(DEFAULT_DATA)
        rows = split(adapted.tokenizer, examples, s.seq_len, s.train_rows, s.eval_size, s.seed).held_out
        model = adapted.load()
        weights = {
            name: tuple(weight.clone() for weight in before_and_after(layer))
            for name, layer in layers_by_name(model).items()
            if isinstance(layer, Over4bit)
        }
        return cls(model.merge_and_unload().bfloat16(), weights, list(rows)[:count])  # type: ignore[arg-type]

    def loss(self, weights: Iterator[tuple[str, Tensor]]) -> float:
        """The held-out loss with these weights."""
        for name, weight in weights:
            self.model.get_submodule(name).weight.data = weight.bfloat16()
        return held_out_loss(
            self.model, self.rows, BATCH, lambda model, batch: model(**batch, use_cache=False).loss.float()
        )


def ours(form: Form) -> Callable[[str, Tensor, Tensor], Tensor]:
    encode = Encoder(form)
    return lambda name, before, after: encode(before, after, None, seed_of(f"{name}.weight")).dequantize(torch.float32)


def rows_of(subject: Subject, base: str, form: str, losses: tuple[float, float]) -> Iterator[dict[str, Any]]:
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
            "ours": measured(weights, ours(Form.named(form))),
        }
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
    arguments = parser.parse_args()
    report = harness.Report(
        "export",
        "What an adapter learnt, in the formats of export",
        [
            f"{DEFAULT_MODEL}, {arguments.steps} steps of the default job. Losses in nats per learnt token of",
            f"{arguments.rows} held-out examples.",
        ],
    )
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        cache = arguments.cache or pathlib.Path(temporary)
        cache.mkdir(exist_ok=True)
        for base in arguments.bases.split(","):
            with torch.enable_grad():
                run = trained(base, arguments.steps, cache)
            subject = Subject.of(run, base, arguments.rows)
            before, best = (subject.loss((name, pair[i]) for name, pair in subject.weights.items()) for i in (0, 1))
            for form in arguments.forms.split(","):
                for row in rows_of(subject, base, form, (before, best)):
                    report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
