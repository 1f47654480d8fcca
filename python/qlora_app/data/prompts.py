"""Prompts for reinforcement learning (GRPO), and the columns that their reward function gets."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_ext.untrusted import excerpt

from ..errors import UserError
from .encoding import Parts, Row, as_prompt, formatted_tokens, in_order, tokenizing
from .examples import QUESTIONS, Example, Message, conversation_in, question, with_system
from .store import Stored

# TRL passes these to every reward function.
_RESERVED = frozenset(
    {
        "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
        "environments",
    }
)  # fmt: skip
_TOO_LONG = "dropped: the prompt and --max-new-tokens exceed --seq-len"
EXPECTED = "a prompt: " + ", ".join(f'"{name}"' for name in (*QUESTIONS, "messages"))


def prompt_of(record: Any, place: str) -> Example:
    """The prompt in a row of ``--data``, ``{"prompt": messages, "columns": {...}}``.

    A conversation that ends with an answer is a prompt without it; the answer becomes the column ``answer``.

    Args:
        record: the columns of the row.
        place: the file and line, for the error message.

    Raises:
        UserError: the row has no prompt, or a column has a name that TRL uses.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: expected an object with {EXPECTED}; got {excerpt(record, 160)}")
    messages, used = _messages(record, place)
    columns = {name: value for name, value in record.items() if name not in used}
    if messages[-1]["role"] == "assistant":
        columns.setdefault("answer", messages[-1]["content"])
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{place}: expected a question before the answer")
    if reserved := sorted(_RESERVED & columns.keys()):
        raise UserError(f"{place}: the column {reserved[0]!r} has a name that TRL uses for rewards; rename it")
    return {"prompt": messages, "columns": columns}


def _messages(record: Mapping[str, Any], place: str) -> tuple[list[Message], set[str]]:
    """The messages of a row, and the names of the columns that they come from."""
    found = conversation_in(record, place)
    if found is not None:
        name, messages = found
        used = {name, "system"}
    else:
        asked = next((name for name in QUESTIONS if record.get(name) is not None), None)
        if asked is None:
            raise UserError(f"{place}: expected an object with {EXPECTED}; got {excerpt(dict(record), 160)}")
        if isinstance(record[asked], str):
            more = record.get("input") if asked == "instruction" else None
            text = "\n\n".join(part for part in (record[asked], more) if isinstance(part, str) and part)
            messages, used = [question(text)], {asked, "system", *(("input",) if more is not None else ())}
        else:
            found = conversation_in({"messages": record[asked]}, place)
            assert found is not None
            messages, used = found[1], {asked, "system"}
    if record.get("tools"):
        raise UserError(f"{place}: tools: not supported with --method grpo")
    if not messages:
        raise UserError(f"{place}: expected a prompt, got an empty conversation")
    return with_system(record, messages, place), {*used, "tools"}


def split_prompts(
    tokenizer: Any, examples: Sequence[Example], longest: int, held_out_rows: int, seed: int
) -> Parts:  # fmt: skip
    """Formats and encodes prompts in an order shuffled by ``seed``. A row has ``prompt_ids``, ``prompt``, ``columns``.

    Args:
        longest: the maximum number of tokens of a prompt; longer prompts are dropped.
        held_out_rows: the maximum number of held-out rows. If there are few prompts, a tenth of them is held out.

    Raises:
        UserError: fewer than two prompts are short enough.
    """
    counts: collections.Counter[str] = collections.Counter()
    rows: Stored[Row] = Stored()
    for i in in_order(examples, seed):
        example: Any = examples[i]
        with tokenizing("--data"):
            text = as_prompt(tokenizer, example["prompt"])
            ids = formatted_tokens(tokenizer, text)
        if not ids or len(ids) > longest:
            counts[_TOO_LONG] += 1
            continue
        row: Any = {"prompt_ids": ids, "prompt": text, "columns": example["columns"]}
        rows.append(row)
    if len(rows) < 2:
        raise UserError(
            f"--data: {len(rows)} of {len(examples)} prompts have at most {longest} tokens, at least two are needed; "
            "expected a larger --seq-len or a smaller --max-new-tokens"
        )
    held_out = min(held_out_rows, max(1, len(rows) // 10))
    return Parts(Stored(rows[i] for i in range(held_out, len(rows))), rows[:held_out], counts)
