"""TRL's DPO (Rafailov et al., 2023): learns which of two answers is preferred, with the base as reference."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from .trainer import RunTrainer, training_arguments

if TYPE_CHECKING:
    from ..data import Row
    from .settings import Settings


def preference_arguments(settings: Settings, steps: int, directory: pathlib.Path, device: torch.device) -> Any:
    """The recipe of ``training_arguments`` for DPO, which by convention has no dropout."""
    more = {"beta": settings.beta, "max_length": settings.seq_len, "per_device_eval_batch_size": settings.batch_size}
    return training_arguments(settings, steps, directory, device, DPOConfig, bf16=False, **more)


class PreferenceTrainer(RunTrainer, DPOTrainer):  # type: ignore[misc,unused-ignore]
    """Trains on preferences that ``data.encoding`` has encoded."""

    def __init__(self, model: Any, args: DPOConfig, train: Sequence[Row], held_out: list[Row], tokenizer: Any) -> None:
        self.held_out = held_out
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(list(train)),
            eval_dataset=Dataset.from_list(held_out),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        # TRL copies the initial adapter as its reference. A new adapter does not change the base, so the base alone is
        # the same reference, without the memory of the copy.
        if "ref" in model.peft_config:
            model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # it holds tokens already

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing. TRL would write a model card into the run's directory."""

    def measure(self) -> dict[str, Any]:
        with torch.random.fork_rng():  # a DataLoader draws a random number, which must not change the training
            loop = self.evaluation_loop(self.get_eval_dataloader(), "held out", prediction_loss_only=True)
        ranked = self._metrics["eval"].pop("rewards/accuracies")
        self._metrics["eval"].clear()
        loss, right = loop.metrics["eval_loss"], sum(ranked) / len(ranked)
        return {"step": self.state.global_step, "eval_loss": loss, "eval_reward_accuracy": right}
