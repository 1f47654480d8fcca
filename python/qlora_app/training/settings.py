"""The options of a fine-tuning run, with their defaults and limits, and the record that --resume reads."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from qlora_ext.formats import BLOCK_SIZES, READ_IN, SERVED_FORMATS
from qlora_ext.sizes import parse_size
from qlora_ext.untrusted import check, excerpt, printable, read_json

from ..data import DEFAULT_DATA
from ..errors import UserError
from ..models.devices import AUTO, check_dtype
from ..models.sources import DEFAULT_MODEL
from ..options import ACTIVATIONS, ACTIVATIONS_HELP, Options, flag, option, schema

METHODS = ("auto", "sft", "dpo", "kto", "grpo", "distill")
STORED = "stored"  # the value of --teacher-load for what the teacher's files hold
DIVERGENCES = ("forward", "reverse", "mix")
OF_TEACHER = ("teacher_load", "teacher_cache", "teacher_top_k", "divergence", "student_samples")  # need --teacher
NO_NEFTUNE = (
    "--neftune-alpha: not supported with DPO and KTO, because the noise would change the base model's answers too"
)
CONSTANT = "constant"
# The schedules of transformers without further parameters. The first two do not depend on the length of the run.
SCHEDULES = (
    CONSTANT,
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
BASE_FORMAT = "base"  # the value of --merge-aware for the format of each layer of the base


def _option(default: Any, text: str, minimum: float | None = None, below: float = 2**31, **more: Any) -> Any:
    return option(default, text, minimum, None if minimum is None else below, **{"metavar": "NAME", **more})


def layer_numbers(text: str) -> list[int]:
    """The layer numbers in ``--layers``, as in 0-3,7; empty if it names all layers.

    Raises:
        UserError: ``text`` is not a list of numbers and ranges.
    """
    numbers: set[int] = set()
    for part in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise UserError(f"--layers {excerpt(text)}: expected layer numbers and ranges from 0, such as 0-3,7")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def named_modules(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """The options of ``qlora-ext finetune``. Defaults follow the QLoRA paper (Dettmers et al., 2023, appendix B)."""

    model: str = _option(DEFAULT_MODEL, "a model directory, a .gguf file, a hub name, or package:NAME", free=True)
    data: str = _option(
        DEFAULT_DATA,
        "a file (.jsonl, .csv, .parquet, .txt, ...), a directory of files, OWNER/NAME on the hub, or package:NAME",
        free=True,
    )
    split: str = _option("train", "the split to read, if the data have several")
    seq_len: int = _option(256, "tokens per row; longer texts make several rows", 2)
    eval_size: int = _option(48, "examples held out to measure perplexity on", 1)

    rank: int = _option(16, "rank of the LoRA matrices", 1)
    alpha: float = _option(32.0, "LoRA alpha; the scaling is alpha / rank", 0, 1e6)
    dropout: float = _option(0.05, "LoRA dropout (not with dpo, kto and grpo)", 0, 1)
    target_modules: str = _option("all-linear", "layers that get an adapter: all-linear, or names separated by commas")
    layers: str = _option("", "numbers of the layers that get an adapter, from 0 on, such as 0-3,7 (default: all)")
    modules_to_save: str = _option(
        "", "modules to train in full and save with the adapter, such as lm_head or embed_tokens, separated by commas"
    )
    rslora: bool = _option(False, "scale by alpha / sqrt(rank), which suits large ranks (rsLoRA)")
    dora: bool = _option(False, "also train the norm of each row of the weights (DoRA; slower steps)")
    block_size: int = _option(64, "weights per scale", choices=BLOCK_SIZES)
    quantize: str = _option(
        "",
        f"quantize the layers of the model to {', '.join(READ_IN)} as they are read (default: nf4, and as stored in a "
        "quantized model)",
        choices=READ_IN,
        metavar="FORMAT",
    )
    init_adapter: str = _option(
        "",
        "an adapter to start from, such as one of quantize --init-lora; it determines rank, alpha and layers",
        free=True,
    )

    merge_aware: str = _option(
        "",
        "train with the 4-bit weights that export writes in this format, so that exporting loses nothing (slower "
        "steps; no dropout): q4_0, iq4_nl, int4, nvfp4, mxfp4 or nf4; base, or no value: those of merge --4bit",
        choices=(BASE_FORMAT, *SERVED_FORMATS),
        bare=BASE_FORMAT,
        metavar="FORMAT",
        schema=(bool, str),
    )

    method: str = _option(
        "auto",
        "sft: learn the answers; dpo (by TRL): learn which of two answers is preferred; kto (by TRL): learn which "
        "answers are good and which bad; grpo (by TRL): sample answers and learn from their rewards; distill: learn "
        "the probabilities of a --teacher; auto: sft, dpo or kto, depending on --data",
        choices=METHODS,
    )
    beta: float = _option(
        0.1,
        "dpo, kto and grpo: larger values keep the model closer to the base (default: 0.1, and 0 with grpo)",
        0,
        1e6,
    )
    generations: int = _option(4, "grpo: answers per prompt", 2)
    max_new_tokens: int = _option(128, "grpo and --student-samples: tokens per answer", 1)
    temperature: float = _option(1.0, "grpo and --student-samples: sampling temperature", 0, 1e3)
    teacher: str = _option("", "distill: a model with the same vocabulary, named as in --model", free=True)
    teacher_load: str = _option(
        STORED,
        "distill: load the teacher as its files store it (dense or 4-bit), quantize it (4bit), or stream its 4-bit "
        "layers (ram, disk) as --stream does",
        choices=(STORED, "4bit", "ram", "disk"),
    )
    teacher_cache: str = _option(
        "",
        "distill: compute the teacher's --teacher-top-k most likely tokens once, before training, and keep them in "
        "this file; later runs with the same rows do not load the teacher",
        free=True,
        metavar="FILE",
    )
    teacher_top_k: int = _option(64, "distill: tokens per position in --teacher-cache", 1)
    divergence: str = _option(
        "forward",
        "distill: KL(teacher, student) (forward), KL(student, teacher) (reverse), or the mean of both (mix)",
        choices=DIVERGENCES,
    )
    student_samples: float = _option(
        0.0, "distill: share of the steps that learn from answers that the model samples itself", 0, maximum=1
    )
    max_steps: int = _option(50, "optimizer steps", 1)
    epochs: float = _option(0.0, "passes over the rows, instead of --max-steps", 0, 1e6)
    batch_size: int = _option(4, "rows per forward pass; short examples share a row", 1)
    grad_accum: int = _option(1, "forward passes per optimizer step", 1)
    lr: float = _option(2e-4, "learning rate", 0, 1e6)
    lr_schedule: str = _option(
        "constant_with_warmup", "learning-rate schedule, by its name in transformers", choices=SCHEDULES
    )
    warmup_ratio: float = _option(0.03, "share of the steps in which the learning rate rises from 0", 0, 1)
    warmup_steps: int = _option(0, "warm-up steps, instead of --warmup-ratio", 0)
    weight_decay: float = _option(0.0, "weight decay of the optimizer", 0, 1e6)
    max_grad_norm: float = _option(0.3, "norm to which gradients are clipped (0: no clipping)", 0, 1e6)
    neftune_alpha: float = _option(
        0.0, "noise added to the embeddings in training (NEFTune; 5 is common, 0: none)", 0, 1e6
    )
    no_packing: bool = _option(False, "put each example into its own padded row")
    optimizer: str = _option(
        "adamw_torch",
        "an optimizer of transformers' Trainer; adamw_8bit and paged_adamw_8bit (with bitsandbytes) save memory",
    )
    seed: int = _option(0, "seed of the adapter's initial values, the data order and dropout", 0, 2**32)
    save_steps: int = _option(20, "steps between checkpoints", 1, free=True)
    eval_steps: int = _option(
        0, "steps between measurements of held-out perplexity (0: only before and after training)", 0, free=True
    )

    report_to: str = _option(
        "none",
        "experiment trackers to report to, by their names in transformers, separated by commas, such as "
        "tensorboard (which writes to OUTPUT/runs), wandb or mlflow",
        free=True,
    )

    dtype: str = _option(AUTO, "bfloat16, float16, float32, or auto: the faster one on this processor")
    activations: str | None = _option(
        None, f"{ACTIVATIONS_HELP}; also gradients (default: as saved)", choices=ACTIVATIONS
    )
    device: str = _option("auto", "auto, cpu, cuda or cuda:N", free=True)
    grad_checkpointing: bool = _option(False, "recompute activations in the backward pass: less memory, more time")
    chunked_loss: bool = _option(False, "never have the logits of all tokens in memory")
    offload_checkpoints: bool = _option(
        False, "with --grad-checkpointing on a GPU: keep the layers' inputs in host memory until the backward pass"
    )
    mlp_chunk: int = _option(
        0, "run the MLPs on at most N tokens at a time, and recompute them backward (0: all tokens)", 0
    )
    stream: str = _option(
        "none",
        "load each frozen layer just before it is used: from ram (pinned host memory, for a GPU) or disk (the files of "
        "a 4-bit model; a dense model is first quantized to OUTPUT-base)",
        choices=("none", "ram", "disk"),
        free=True,
    )
    resident: str = _option(
        "",
        "with --stream: memory that the weights may use on the device, such as 6GB (default: the minimum)",
        free=True,
        metavar="SIZE",
    )

    max_memory: str = _option(
        "", "choose the memory-saving options with which the run fits into this much, such as 8GB", metavar="SIZE"
    )

    # Not an option: the numbers of steps before --resume --max-steps extended the run, in increasing order.
    former_steps: tuple[int, ...] = ()

    @property
    def step_rows(self) -> int:
        """Rows per optimizer step."""
        return self.batch_size * self.grad_accum

    @property
    def train_rows(self) -> int | None:
        """The number of rows that the run can use; None for all."""
        return None if self.epochs else self.max_steps * self.step_rows

    @property
    def stages(self) -> list[int]:
        """The number of rows that the run can use, for each of its former lengths and for the current one."""
        return [steps * self.step_rows for steps in (*self.former_steps, self.max_steps)]

    @property
    def first_rows(self) -> int | None:
        """The number of rows that the run could use at its start, when rows were held out; None for all."""
        return None if self.epochs else self.stages[0]

    @property
    def longer(self) -> str:
        """The option that extends a resumed run."""
        return "epochs" if self.epochs else "max_steps"

    @property
    def depends_on_length(self) -> bool:
        """Whether the learning rate at a step depends on the number of steps."""
        return self.lr_schedule in ("linear", "cosine", "cosine_with_restarts", "polynomial")

    def warmup(self, steps: int) -> int:
        """The number of warm-up steps in a run of ``steps`` steps."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * steps)

    def steps(self, rows: int) -> int:
        """The number of optimizer steps for so many rows. Each epoch ends with a step, as in transformers' Trainer."""
        if self.method == "grpo":
            rows *= self.generations
        steps_per_epoch = math.ceil(math.ceil(rows / self.batch_size) / self.grad_accum)
        return max(1, math.ceil(self.epochs * steps_per_epoch)) if self.epochs else self.max_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        samples = self.method == "grpo" or self.student_samples
        positive = ("alpha", "lr", "temperature") if samples else ("alpha", "lr", "beta")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"{flag(name)} {getattr(self, name)}: expected a positive number")
        if self.merge_aware and self.dora:
            raise UserError("--merge-aware supports plain LoRA only; remove --dora")
        if self.merge_aware and self.dropout:
            raise UserError(f"--merge-aware: merged weights have no dropout; expected --dropout 0, got {self.dropout}")
        if self.quantize and self.merge_aware not in ("", BASE_FORMAT, self.quantize):
            raise UserError(f"--quantize {self.quantize}: expected the format of --merge-aware {self.merge_aware}")
        if self.quantize and self.init_adapter:
            raise UserError("--quantize and --init-adapter exclude each other: that adapter has a base already")
        if self.merge_aware and self.stream != "none":
            raise UserError(
                "--merge-aware and --stream exclude each other: merged weights of every layer stay in memory"
            )
        if self.neftune_alpha and self.method in ("dpo", "kto"):
            raise UserError(NO_NEFTUNE)
        if self.method == "grpo":
            self._check_grpo()
        if (self.method == "distill") != bool(self.teacher):
            raise UserError("--method distill and --teacher need each other")
        if self.student_samples:
            self._check_answers()
            if self.teacher_cache:
                raise UserError("--student-samples and --teacher-cache exclude each other: the file has no new answers")
        layer_numbers(self.layers)
        lengths = [0, *self.former_steps, self.max_steps]
        if not self.epochs and lengths != sorted(set(lengths)):
            raise UserError(f"former_steps {list(self.former_steps)}: expected increasing lengths below --max-steps")
        if self.offload_checkpoints and not self.grad_checkpointing:
            raise UserError("--offload-checkpoints needs --grad-checkpointing")
        if self.resident and self.stream == "none":
            raise UserError(f"--resident {self.resident} needs --stream ram or --stream disk")
        for name in ("merge_aware", "layers", "dora"):
            if self.max_memory and getattr(self, name):
                raise UserError(f"--max-memory: the planner does not support {flag(name)}")
        for name in ("resident", "max_memory"):
            if size := getattr(self, name):
                try:
                    parse_size(flag(name), size)
                except ValueError as error:
                    raise UserError(str(error)) from error
        check_dtype(self.dtype)

    def _check_grpo(self) -> None:
        if self.step_rows % self.generations:
            raise UserError(
                f"--generations {self.generations}: expected a divisor of --batch-size times --grad-accum, which is "
                f"{self.step_rows}"
            )
        self._check_answers()
        for name in ("dropout", "neftune_alpha", "no_packing", "chunked_loss", "max_memory", "merge_aware"):
            if getattr(self, name):
                raise UserError(f"{flag(name)}: not supported with --method grpo")

    def _check_answers(self) -> None:
        if self.max_new_tokens >= self.seq_len:
            raise UserError(
                f"--max-new-tokens {self.max_new_tokens}: expected less than --seq-len, which is {self.seq_len} tokens "
                "for prompt and answer"
            )


def _with_format(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the name of a format as merge_aware, which used to be a bool."""
    aware = values.get("merge_aware")
    return {**values, "merge_aware": BASE_FORMAT if aware else ""} if isinstance(aware, bool) else {**values}


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The settings of a run, from its ``settings.json``.

    Raises:
        FileError: the file is damaged.
    """
    return _with_format({name: value for name, value in read_json(path, schema(Settings)).items() if value is not None})


def recorded(values: dict[str, Any], path: pathlib.Path) -> Settings:
    """The settings among the ``values`` in the file ``path``. Other values are ignored.

    Raises:
        FileError, UserError: a value has a wrong type, or is out of range.
    """
    check(values, schema(Settings), printable(path), "settings")
    known = {name: value for name, value in named_settings(values).items() if value is not None}
    try:
        return Settings(**_with_format(known))
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error


def options_of(changes: Mapping[str, Any]) -> str:
    """Changed settings as command-line options."""
    options = (flag(name) if value is True else f"{flag(name)} {value}" for name, value in changes.items())
    return " ".join(options) or "no option"


# The first option of each group in the help.
GROUPS = {"model": "model and text", "rank": "adapter", "method": "training", "dtype": "machine and memory"}


def named_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among ``values``."""
    names = {field.name for field in dataclasses.fields(Settings)}
    return {name: value for name, value in values.items() if name in names}


def given(options: Mapping[str, Any], resume: bool = False) -> dict[str, Any]:
    """The settings that the user gave, and those that follow from them.

    Args:
        resume: whether they are for a resumed run.

    Raises:
        UserError: two settings contradict each other, or one is empty.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    typed = _with_format(options)
    for name, value in typed.items():
        # An unset shell variable gives an empty value. For a resumed run, it means to remove the option.
        if value == defaults[name] == "" and not resume:
            raise UserError(f"{flag(name)}: the value is empty; remove the option")
    if typed.get("epochs") and "max_steps" in typed:
        raise UserError("--epochs and --max-steps exclude each other; give one of them")
    if typed.get("warmup_steps") is not None:
        if typed.get("warmup_ratio"):
            raise UserError("--warmup-steps and --warmup-ratio exclude each other; give one of them")
        typed["warmup_ratio"] = 0.0
    if typed.get("lr_schedule") == CONSTANT:
        if typed.get("warmup_steps") or typed.get("warmup_ratio"):
            raise UserError("--lr-schedule constant has no warm-up; use constant_with_warmup")
        typed["warmup_ratio"] = 0.0
    if typed.get("merge_aware"):
        typed.setdefault("dropout", 0.0)  # merge-aware adapters cannot have dropout
    if typed.get("method") == "grpo":
        typed.setdefault("dropout", 0.0)  # answers are sampled without dropout
        typed.setdefault("beta", 0.0)
    return typed


def resumed(recorded: dict[str, Any], typed: dict[str, Any]) -> Settings:
    """The settings of a resumed run: the recorded ones, updated by those that may change.

    The paths of model and data may change, because digests identify their content.

    Raises:
        UserError: a given option may not change.
    """
    known = {field.name: field for field in dataclasses.fields(Settings)}
    if unknown := set(recorded) - set(known):
        raise UserError(f"--resume: the run was started by another version of qlora-ext (it has {sorted(unknown)})")
    former = Settings(**recorded)
    longer = {}
    for name, value in typed.items():
        if name == former.longer and value > getattr(former, name):
            longer["former_steps"] = () if former.epochs else (*former.former_steps, former.max_steps)
        elif not known[name].metadata.get("free") and value != getattr(former, name):
            advice = "leave the option out, or start over in another --output"
            if name == former.longer:
                advice = f"a run can be made longer, not shorter; {advice}"
            elif name in ("epochs", "max_steps"):
                advice = f"{flag(former.longer)} makes it longer; {advice}"
            raise UserError(f"{flag(name)} {value}: the run was started with {getattr(former, name)}; {advice}")
    return Settings(**{**recorded, **typed, **longer})
