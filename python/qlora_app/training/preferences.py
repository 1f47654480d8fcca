"""TRL's DPO (Rafailov et al., 2023), which learns which of two answers is preferred, and KTO (Ethayarajh et al., 2024).

KTO learns from single answers with a label, which says whether they are good. Both take the base as the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from ..models.validate_model import longest_input
from .trainer import RunTrainer

if TYPE_CHECKING:
    from ..data import Row
    from .run import Run
    from .settings import Settings


class _EncodedTrainer(RunTrainer):
    """Trains on answers that ``data.encoding`` has encoded, by a trainer of TRL that is another base class."""

    def __init__(self, run: Run) -> None:
        args = run.arguments
        super().__init__(
            run,
            train_dataset=Dataset.from_list(self._rows(run.parts.train, args.per_device_train_batch_size)),
            eval_dataset=Dataset.from_list(self._rows(run.parts.held_out, args.per_device_eval_batch_size)),
            processing_class=run.tokenizer,
        )

    @classmethod
    def more_arguments(cls, settings: Settings) -> dict[str, Any]:
        size = settings.batch_size
        return {"beta": settings.beta, "max_length": settings.seq_len, "per_device_eval_batch_size": size}

    def _rows(self, rows: Sequence[Row], batch_size: int) -> list[Any]:
        """The rows as TRL's collator takes them."""
        return list(rows)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # it holds tokens already

    def _held_out_metrics(self) -> tuple[float, dict[str, list[float]]]:
        """The loss of the held-out rows, and TRL's metrics per batch."""
        with torch.random.fork_rng():  # a DataLoader draws a random number, which must not change the training
            loop = self.evaluation_loop(self.get_eval_dataloader(), "held out", prediction_loss_only=True)
        metrics = dict(self._metrics["eval"])
        self._metrics["eval"].clear()
        return loop.metrics["eval_loss"], metrics


class PreferenceTrainer(_EncodedTrainer, DPOTrainer):  # type: ignore[misc,unused-ignore]
    """Trains on preferences, by convention without dropout."""

    kind = DPOConfig

    def measure(self) -> dict[str, Any]:
        loss, metrics = self._held_out_metrics()
        ranked = metrics["rewards/accuracies"]
        return {"step": self.state.global_step, "eval_loss": loss, "eval_reward_accuracy": sum(ranked) / len(ranked)}


def _mismatched(rows: Sequence[Row], batch_size: int) -> Iterator[dict[str, Any]]:
    """The rows, each with the answer of another row of its batch, from which KTO estimates its KL divergence.

    As in TRL, the answers of a batch move on by one row. A last row without a batch takes the answer before it.
    """
    for i, row in enumerate(rows):
        last = min(i + batch_size, len(rows)) - 1
        other = rows[last if i % batch_size == 0 and last > i else i - 1]
        yield {**row, "KL_completion_ids": other["completion_ids"], "label": bool(row["label"][0])}


class LabelTrainer(_EncodedTrainer, KTOTrainer):  # type: ignore[misc,unused-ignore]
    """Trains on answers with a label. The batches consist of neighbouring rows, which are shuffled already."""

    kind = KTOConfig

    def __init__(self, run: Run) -> None:
        # A question with the answer of another row may be longer than any example.
        run.arguments.max_length = min(run.arguments.max_length, longest_input(run.model) or run.arguments.max_length)
        super().__init__(run)

    def _rows(self, rows: Sequence[Row], batch_size: int) -> list[Any]:
        return list(_mismatched(rows, batch_size))

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return KTOTrainer._get_train_sampler(self, dataset)  # in order, because the rows of a batch belong together

    def measure(self) -> dict[str, Any]:
        loss, metrics = self._held_out_metrics()
        measured = {"step": self.state.global_step, "eval_loss": loss}
        good, bad = self._mean(metrics.get("rewards/chosen"), 1), self._mean(metrics.get("rewards/rejected"), 0)
        return measured if good is None or bad is None else {**measured, "eval_reward_margin": good - bad}

    def _mean(self, means: list[float] | None, label: int) -> float | None:
        """The mean over the held-out rows with that label, from the means of the batches that have such rows."""
        size = self.args.per_device_eval_batch_size
        batches = (self.held_out[start : start + size] for start in range(0, len(self.held_out), size))
        counts = [n for batch in batches if (n := sum(row["label"] == [label] for row in batch))]
        return sum(mean * n for mean, n in zip(means, counts, strict=True)) / sum(counts) if means else None
