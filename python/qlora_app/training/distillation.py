"""``--method distill``: learns the probabilities that a teacher gives to the tokens (Hinton et al., 2015), on the rows
of the data or on the student's own answers (Agarwal et al., 2023).

TRL's ``DistillationTrainer`` learns from the student's own answers only, and has no cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from qlora_ext.divergence import Logits, Targets, TopK, summed_divergence
from qlora_ext.fidelity import perplexity

from ..data import Row, pack
from ..decoding import Rollouts, Sampling
from .teacher_cache import TeacherCache
from .trainer import QLoRATrainer, collate

if TYPE_CHECKING:
    from .run import Run
    from .settings import Settings

_IDS, _LOGPROBS = "teacher_ids", "teacher_logprobs"  # of a batch with a cache


@dataclasses.dataclass
class _Arguments(TrainingArguments):  # type: ignore[misc,unused-ignore]
    max_completion_length: int = 128  # by which Rollouts knows whether compiling pays


def prompts_of(batch: dict[str, torch.Tensor]) -> Iterator[list[int]]:
    """The tokens before the first learnt one of each example in a batch of packed rows; at least the first token."""
    for row in zip(*(batch[key].tolist() for key in ("input_ids", "labels", "position_ids")), strict=True):
        ids, labels, positions = row
        begins = [i for i, position in enumerate(positions) if position == 0]
        for begin, end in itertools.pairwise([*begins, len(ids)]):
            learnt = next((i for i in range(begin, end) if labels[i] != -100), None)
            if learnt is not None:
                yield ids[begin : max(learnt, begin + 1)]


class DistillationTrainer(QLoRATrainer):
    """Minimizes the divergence from the teacher, on packed rows."""

    kind = _Arguments

    def __init__(self, run: Run) -> None:
        self._settings, self._teacher, self._vocabulary = run.settings, run.teacher, run.vocabulary
        self._rollouts = Rollouts(progress=run.report)
        super().__init__(run)

    @classmethod
    def more_arguments(cls, settings: Settings) -> dict[str, Any]:
        return {"max_completion_length": settings.max_new_tokens}

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        if not isinstance(self._teacher, TeacherCache):
            return collate(rows)
        targets = self._teacher.read(rows)
        return {**collate(rows), _IDS: targets.ids, _LOGPROBS: targets.logprobs}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        learnt = inputs.pop("labels")[:, 1:] != -100
        teacher: Targets
        if _IDS in inputs:
            teacher = TopK(inputs.pop(_IDS), inputs.pop(_LOGPROBS))
        else:
            with torch.no_grad():
                teacher = Logits.of(self._teacher, inputs, learnt, self._vocabulary)
        student = Logits.of(model, inputs, learnt, self._vocabulary)
        total = summed_divergence(student, teacher, self._settings.divergence)
        return total / (learnt.sum() if num_items_in_batch is None else num_items_in_batch)

    def measure(self) -> dict[str, Any]:
        """The mean divergence in nats per learnt token, and the perplexity of the text itself."""
        loss = self.held_out_mean(self.compute_loss)
        of_text = self.held_out_mean(self._cross_entropy)
        return {"step": self.state.global_step, "eval_loss": loss, "eval_text_perplexity": perplexity(of_text)}

    def _cross_entropy(self, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        return super().compute_loss(model, {k: v for k, v in batch.items() if k not in (_IDS, _LOGPROBS)})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> Any:
        """The batches of a step. In some steps, the student's own answers replace those of the rows.

        The random numbers depend on the seed and the step alone, so a resumed run samples the same answers.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        numbers = random.Random(f"{self.args.seed} {self.state.global_step}")
        if numbers.random() >= self._settings.student_samples:
            return batches, count
        batches = [self._answered(batch, numbers.getrandbits(32)) for batch in batches]
        return batches, sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)

    def _answered(self, batch: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        """A batch of the same number of rows with the student's answers to the prompts in ``batch``."""
        s = self._settings
        sampling = Sampling(max_new_tokens=s.max_new_tokens, temperature=s.temperature, seed=seed)
        prompts = [prompt[-(s.seq_len - s.max_new_tokens) :] for prompt in prompts_of(batch)]
        done = self._rollouts.answers(self, prompts, sampling)
        rows = [{"input_ids": one.prompt + one.tokens, "labels": [-100] * len(one.prompt) + one.tokens} for one in done]
        answered = collate(pack(rows, s.seq_len)[: len(batch["input_ids"])])
        return {key: value.to(batch["input_ids"].device) for key, value in answered.items()}
