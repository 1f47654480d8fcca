"""Measures a model on a run's held-out rows, and generates a sample, before and after training."""

from __future__ import annotations

from typing import Any

from qlora_ext.untrusted import Schema, read_json

from ..data import Row
from ..errors import UserError
from ..generation.completion import complete
from ..outputs.files import write_json
from .run import Run

_TOKENS = 40  # of a sample
_BEFORE: Schema = {
    "loss?": float,
    "perplexity?": float,
    "text_perplexity?": float,
    "reward_accuracy?": float,
    "reward_margin?": float,
    "reward?": float,
    "prompt": str,
    "sample": str,
}


def _asked(row: Row) -> list[int]:
    """The tokens of a row before the first learnt one; for a plain text, its first tokens."""
    if "prompt_ids" in row:
        return row["prompt_ids"]
    ids = row["input_ids"]
    learnt = next(i for i, label in enumerate(row["labels"]) if label != -100)
    return ids[: learnt or max(1, min(24, len(ids) // 2))]


def sample(run: Run) -> tuple[str, str]:
    """The longest prompt of the held-out rows, and the model's completion, as text."""
    prompt = max(map(_asked, run.parts.held_out), key=len)
    answer = complete(run.model, run.tokenizer, prompt, _TOKENS)
    return run.tokenizer.decode(prompt, skip_special_tokens=True), answer


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """The measurements, without the prefix of the Trainer."""
    return {key.removeprefix("eval_"): value for key, value in measured.items() if key.startswith("eval_")}


def measure_before(run: Run) -> dict[str, Any]:
    """The measurements and the sample of the untrained model. A resumed run reads them from a file."""
    path = run.directory / "before.json"
    if path.is_file():
        before: dict[str, Any] = read_json(path, _BEFORE)
        if not before.keys() & {"loss", "reward"}:
            raise UserError(f"{path}: expected a loss or a reward in it, found none")
        return before
    prompt, answer = sample(run)
    before = {**figures(run.trainer.measure()), "prompt": prompt, "sample": answer}
    write_json(path, before)
    return before
