"""transformers' Trainer with atomic checkpoints, and with an evaluation that has no side effects."""

from __future__ import annotations

import abc
import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from qlora_ext.fidelity import perplexity
from qlora_ext.output_head import has_plain_head
from qlora_ext.streaming import offload_checkpoints
from qlora_ext.untrusted import Schema, excerpt, read_json

from ..data import Row, pack
from ..errors import UserError, first_line
from ..models.loss import learnt_loss
from ..models.validate_model import named
from ..outputs.files import delete, move_up, staged_directory
from ..outputs.ownership import foreign_in_checkpoint
from .checkpoints import checkpoints, step_of, write_manifest
from .settings import Settings, named_modules

if TYPE_CHECKING:
    from .run import Run

_MAX_CHECKPOINTS = 2
_STATE: Schema = {
    "global_step": int,
    "max_steps": int,
    "num_input_tokens_seen": int,
    "log_history": [{"step": int, "loss?": float, "eval_loss?": float, "eval_reward?": float}],
}


def _trackers(names: str) -> list[str]:
    """The experiment trackers in a list with commas, by transformers' names.

    Raises:
        UserError: transformers does not know one, or it is not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    trackers = [] if names == "none" else named_modules(names)
    for name in trackers:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", *sorted(INTEGRATION_TO_CALLBACK)])
            raise UserError(f"--report-to {excerpt(name)}: expected one of {known}")
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report-to {name}: {name} is not installed; install it with: pip install {name}")
    return trackers


def training_arguments(
    settings: Settings,
    steps: int,
    directory: pathlib.Path,
    device: torch.device,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """The trainer's arguments for ``settings``, whose defaults follow the QLoRA paper.

    Args:
        steps: the number of optimizer steps.
        kind: the class of the arguments.
        more: further arguments of ``kind``.
    """
    if ("8bit" in settings.optimizer or "paged" in settings.optimizer) and not importlib.util.find_spec("bitsandbytes"):
        raise UserError(
            f"--optimizer {settings.optimizer} needs bitsandbytes; install it with: pip install bitsandbytes"
        )
    try:
        return kind(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.grad_accum,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.lr_schedule,
            warmup_steps=settings.warmup(steps),
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            neftune_noise_alpha=settings.neftune_alpha or None,
            optim=settings.optimizer,
            gradient_checkpointing=settings.grad_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if settings.grad_checkpointing else None,
            save_steps=settings.save_steps,
            eval_strategy="steps" if settings.eval_steps else "no",
            eval_steps=settings.eval_steps or None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="all",
            seed=settings.seed,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            report_to=_trackers(settings.report_to),
            disable_tqdm=True,
            bf16=False,  # the model computes in its own dtype; TRL's default is autocast
            **more,
        )
    except ValueError as error:
        if "OptimizerNames" not in str(error):
            raise
        raise UserError(f"--optimizer {settings.optimizer}: transformers has no such optimizer") from error


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Pads packed rows to the longest: tensors [B, T]. Positions restart in the padding, so no token attends to it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def integers(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    def padded(key: str, fill: int) -> torch.Tensor:
        return integers([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "position_ids": integers(positions),
    }


def packed(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows, packed up to the length of the longest."""
    return pack(rows, max(len(row["input_ids"]) for row in rows))


def batches(
    rows: Sequence[Row], size: int, device: torch.device, collator: Callable[[Any], dict[str, torch.Tensor]] = collate
) -> Iterator[dict[str, torch.Tensor]]:
    """All rows, ``packed`` and collated, ``size`` packed rows at a time."""
    rows = packed(rows)
    for start in range(0, len(rows), size):
        yield {key: value.to(device) for key, value in collator(rows[start : start + size]).items()}


class StagedSampler(torch.utils.data.Sampler[int]):
    """The order of the rows in an extended run: its first pass continues where the shorter run ended.

    A pass over all rows is in the order in which transformers' Trainer would take them. The first pass takes the
    original rows of the run in that order, followed by the rows that each extension added.
    """

    def __init__(self, ends: Sequence[int], seed: int) -> None:
        self._ends, self._seed, self._epoch = sorted(set(ends)), seed, 0

    def __len__(self) -> int:
        return self._ends[-1]

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator(device="cpu")
        begin = 0
        for end in self._ends if self._epoch == 0 else self._ends[-1:]:
            generator.manual_seed(self._seed + self._epoch)
            yield from (
                begin + i
                for i in torch.randperm(end - begin, generator=generator, dtype=torch.int64, device="cpu").tolist()
            )
            begin = end


class RunTrainer(Trainer, abc.ABC):  # type: ignore[misc,unused-ignore]
    """The base class of our trainers: atomic checkpoints, and an evaluation without side effects.

    Attributes:
        kind: the class of its arguments.
        stages: the numbers of rows that were available at each former length of an extended run.
    """

    kind: type[TrainingArguments] = TrainingArguments
    _staging: pathlib.Path | None = None

    def __init__(self, run: Run, **more: Any) -> None:
        self.held_out = run.parts.held_out
        self.stages = run.settings.stages[:-1]
        super().__init__(model=run.model, args=run.arguments, **more)
        self.remove_callback(PrinterCallback)
        # TRL copies the initial adapter as its reference. A new adapter does not change the base, so the base alone is
        # the same reference, without the memory of the copy.
        if "ref" in run.model.peft_config:
            run.model.delete_adapter("ref")

    @classmethod
    def more_arguments(cls, settings: Settings) -> dict[str, Any]:
        """The arguments of ``kind`` that ``training_arguments`` does not know."""
        return {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing. TRL would write a model card into the run's directory."""

    @abc.abstractmethod
    def measure(self) -> dict[str, Any]:
        """Measures the held-out rows. Returns a line of ``metrics.jsonl``, see ``describe``."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = self.measure()
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.stages:
            return super()._get_train_sampler(train_dataset)
        rows = len(self.train_dataset)
        return StagedSampler([*(min(stage, rows) for stage in self.stages), rows], self.args.seed)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        run = pathlib.Path(self.args.output_dir)
        with staged_directory(run / name, foreign_in_checkpoint) as partial:
            # The Trainer writes into partial/checkpoint-N, whose content is then moved up.
            self._staging = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            move_up(partial / name)
            write_manifest(partial)
        for old in checkpoints(run)[:-_MAX_CHECKPOINTS]:
            try:
                delete(old, run, foreign_in_checkpoint)
            except UserError as error:
                print(f"note: {old.name} is kept: {error}", flush=True)


class QLoRATrainer(RunTrainer):
    """Trains on packed rows; see ``data.pack``."""

    def __init__(self, run: Run) -> None:
        self._chunked = run.settings.chunked_loss
        self._plain_head = has_plain_head(run.model.get_base_model())
        rows = {"train_dataset": run.parts.train, "eval_dataset": run.parts.held_out}
        super().__init__(run, data_collator=self.collate, **rows)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """A batch of packed rows."""
        return collate(rows)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self._plain_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return learnt_loss(model, inputs, num_items_in_batch, self._chunked and model.training)

    def measure(self) -> dict[str, Any]:
        """The mean cross-entropy in nats per learnt token, as the training computes it. No random number is drawn."""
        loss = self.held_out_mean(self.compute_loss)
        return {"step": self.state.global_step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}

    def held_out_mean(self, loss_of: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]) -> float:
        """The mean over the learnt tokens of the held-out rows of what ``loss_of`` computes for a model and a batch."""
        model, total, count = self.model, 0.0, 0
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for batch in batches(self.held_out, self.args.per_device_train_batch_size, model.device, self.collate):
                learnt = int((batch["labels"][:, 1:] != -100).sum())
                total += float(loss_of(model, batch)) * learnt
                count += learnt
        model.train(was_training)
        return total / count


class Diverged(UserError):
    """The loss is not finite."""


class _Beginning(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Applies the options of this command when the training begins, after the checkpoint has been loaded.

    Attributes:
        loaded: whether the checkpoint has been loaded, which is before the first step.
    """

    loaded = False

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # the intervals of this command, not those of the checkpoint
        if self._run.settings.offload_checkpoints:
            offload_checkpoints(model)  # the Trainer has enabled gradient checkpointing
        if self._run.checkpoint is not None:
            self._rescale(args, state, kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.loaded = True

    def _rescale(self, args: Any, state: Any, optimizer: Any, scheduler: Any) -> None:
        """Sets the learning rate to the value of its schedule, which spans all steps.

        A checkpoint holds the learning rate that the run would have had before it was extended.
        """
        rates = [rate * factor(scheduler.last_epoch)
                 for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]  # fmt: skip
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self._run.longer and self._run.settings.depends_on_length:
            self._run.report(
                f"the {args.lr_scheduler_type.value} schedule spans all {state.max_steps} steps now: the learning rate "
                f"at step {state.global_step + 1} is {rates[0]:.3g}"
            )


class NameInertAdapters(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Reports through ``report`` which adapters got no gradient in the first step."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report: Callable[[str], None] | None = report

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._report is None:
            return
        from qlora_ext.integrations.peft import inert_adapters

        inert = inert_adapters(model)
        if inert:
            self._report(f"no gradient in the first step: these adapters learn nothing: {named(inert)}")
        self._report = None


def run_trainer(run: Run) -> None:
    """Trains to the last step, starting from the checkpoint of the run if it has one."""
    from ..models.adapter_files import complete_adapter

    trainer, checkpoint = run.trainer, run.checkpoint
    if checkpoint is not None:
        read_json(checkpoint / "trainer_state.json", _STATE)
    beginning = _Beginning(run)
    trainer.add_callback(beginning)
    try:
        if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
            # The run is complete, but the Trainer would train one more step.
            with complete_adapter():
                trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            return
        with complete_adapter():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise UserError(
            "not enough GPU memory; try --grad-checkpointing, --chunked-loss, a smaller --batch-size or --seq-len"
        ) from error
    except FloatingPointError as error:
        raise Diverged(first_line(error)) from error
    except Exception as error:
        # Before the first step, the checkpoint is loaded, and a damaged one may raise any exception.
        if checkpoint is None or beginning.loaded:
            raise
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {first_line(error)}; delete it to use the one before it"
        ) from error
