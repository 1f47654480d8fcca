"""The text on which models are compared: sequences of tokens from data that was not used for training."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import UserError
from ..models.sources import PACKAGE
from ..models.validate_model import longest_input
from ..special_tokens import sequences, special_tokens
from . import DEFAULT_DATA, Example, Row, encode, in_order, read_examples
from .store import Stored

LENGTH = 256
_MIN_TOKENS = 32  # for four sequences


def default_text() -> str:
    """The default data of ``finetune``, or "self" if they are not installed."""
    try:
        importlib.metadata.distribution(DEFAULT_DATA.removeprefix(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return "self"
    return DEFAULT_DATA


def _rows(tokenizer: Any, examples: Sequence[Example]) -> Iterator[Row]:
    """Rows in the default order of ``finetune``, which holds out the first ones."""
    shuffled = (examples[i] for i in in_order(examples, 0))
    rows = encode(tokenizer, shuffled, LENGTH, preferences=False)
    if not any(isinstance(example, str) for example in examples):
        return rows
    pieces = Stored(rows)
    return (pieces[i] for i in in_order(pieces, 0))


def length_for(model: Any) -> int:
    """The length of sequences for ``model``."""
    return min(LENGTH, longest_input(model) or LENGTH)


def written(model: Any, count: int, seed: int) -> Any:
    """About ``count`` tokens that ``model`` writes, at least one sequence: int64 [B, T], with T = ``length_for`` it."""
    from qlora_ext.calibration import self_text

    length = length_for(model)
    return self_text.write(model, max(1, count // length), length, seed)


def blocks(name: str, tokenizer: Any, count: int, longest: int) -> Any:
    """About ``count`` tokens of the data ``name``: int64 [B, T], with T = LENGTH, or less for a short text.

    Args:
        longest: the model's maximum sequence length.

    Raises:
        UserError: the data do not exist, or are too short.
    """
    import torch

    rows = _rows(tokenizer, read_examples(name))
    ids = list(itertools.islice((i for row in rows for i in row["input_ids"]), count))
    if len(ids) < _MIN_TOKENS:
        raise UserError(f"--data {name}: expected a text of at least {_MIN_TOKENS} tokens, got {len(ids)}")
    length = min(LENGTH, longest, len(ids) // 4)
    found = [part for part in sequences(ids, length, special_tokens(tokenizer)[0]) if len(part) == length]
    return torch.tensor(found, dtype=torch.int64, device="cpu")
