"""The loss of a model on the examples of a finished run."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data import Parts, Row, is_labelled, is_preference, pack, read_examples, split
from ..errors import UserError
from ..models.adapter_files import RECORD, record_of
from .settings import recorded

if TYPE_CHECKING:
    import torch


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
    if s.method != "sft" and (is_preference(examples[0]) or is_labelled(examples[0])):
        kind = "preferences (DPO)" if is_preference(examples[0]) else "labels (KTO)"
        raise UserError(f"{option}: expected a run that was trained on answers, got one trained on {kind}")
    parts = split(tokenizer, examples, s.seq_len, s.first_rows, s.eval_size, s.seed, packing=not s.no_packing)
    return parts, s.batch_size, s.data


def token_losses(model: Any, rows: Sequence[Row], size: int, compute: torch.dtype) -> torch.Tensor:
    """The loss of each learnt token of rows, float64 on the CPU, ``size`` rows at a time, computed in ``compute``."""
    import torch

    from qlora_ext.nn import computing_in

    from .trainer import collate

    rows = pack(rows, max(len(row["input_ids"]) for row in rows))
    losses = []
    with computing_in(model.eval(), compute), torch.no_grad():
        for start in range(0, len(rows), size):
            batch = {key: value.to(model.device) for key, value in collate(rows[start : start + size]).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1][labels != -100]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), labels[labels != -100], reduction="none"))
    return torch.cat(losses).double().cpu()
