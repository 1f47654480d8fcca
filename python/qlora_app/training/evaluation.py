"""The examples of a finished run, on which its model is compared with others."""

from __future__ import annotations

import pathlib
from typing import Any

from ..data import Parts, is_labelled, is_preference, read_examples, split
from ..errors import UserError
from ..models.adapter_files import RECORD, record_of
from .settings import recorded


def rows_of_run(adapter: pathlib.Path, tokenizer: Any, option: str) -> tuple[Parts, int, str]:
    """The rows of the run of ``adapter``, its batch size, and the name of its data.

    Args:
        option: the option that needs them, for the error message.

    Raises:
        UserError: the adapter does not record a run, its data cannot be read, or they are preferences.
    """
    values = record_of(adapter).get("settings")
    if not values:
        raise UserError(f"{option}: the adapter does not record its held-out data; adapters of qlora-ext finetune do")
    s = recorded(values, adapter / RECORD)
    if s.method == "grpo":
        raise UserError(f"{option}: expected a run that was trained on answers, got one trained on rewards (GRPO)")
    examples = read_examples(s.data, s.split)
    if s.method not in ("sft", "distill") and (is_preference(examples[0]) or is_labelled(examples[0])):
        kind = "preferences (DPO)" if is_preference(examples[0]) else "labels (KTO)"
        raise UserError(f"{option}: expected a run that was trained on answers, got one trained on {kind}")
    parts = split(tokenizer, examples, s.seq_len, s.first_rows, s.eval_size, s.seed, packing=not s.no_packing)
    return parts, s.batch_size, s.data
