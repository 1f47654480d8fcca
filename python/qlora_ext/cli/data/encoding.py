"""Token ids of examples, by the model's own tokenizer and chat template; what is cut or dropped is counted."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from ..errors import UserError, first_line, is_panic
from .examples import Example, Message, is_conversation, is_preference, question
from .store import Stored

# Of equal length: "input_ids" and "labels" (-100: not learnt), and packed rows' "position_ids". Of a preference:
# "prompt_ids", "chosen_ids" and "rejected_ids".
Row: TypeAlias = "dict[str, list[int]]"

CUT = "cut to --seq-len"
_BEYOND = "dropped: what is to be learnt begins beyond --seq-len"
_NOTHING = "dropped: nothing to learn in it (no answer of the assistant, or a single token)"
_REWRITTEN = "dropped: the chat template writes the question in another way once it is answered"
_SAME = "dropped: chosen and rejected are the same, up to --seq-len"


@contextlib.contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """Turns what goes wrong in a tokenizer or its chat template into a ``UserError`` about ``what``.

    Both are programs that a model's files bring along, and fail in any way whatever.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(f"{what}: the model's tokenizer cannot encode it ({first_line(error)})") from error


def check_template(tokenizer: Any, examples: Iterable[Example], data: str, model: str) -> None:
    """Refuses conversations that the tokenizer has no chat template for, and tools that the template knows nothing of.

    A single question and its answer need no template.

    Raises:
        UserError: so it is; ``data`` and ``model`` are named.
    """
    for example in examples:
        if isinstance(example, str):
            continue
        if not tokenizer.chat_template:
            if is_conversation(example) or (is_preference(example) and len(example["prompt"]) > 1):
                raise UserError(
                    f"--data {data} holds conversations, and the tokenizer of {model} has no chat template to write "
                    'them with; take a model for chat, or data of pairs ("prompt" and "completion") or "text"'
                )
            continue
        if isinstance(example, list):
            continue
        tools = example.get("tools")
        messages = example.get("messages") or [*example["prompt"], *example["chosen"], *example["rejected"]]
        template = str(tokenizer.get_chat_template(tools=tools))
        for name, there in (("tools", tools), ("tool_calls", any("tool_calls" in m for m in messages))):
            if there and name not in template:
                raise UserError(f"--data {data} holds {name}, which the chat template of {model} does not write")


def as_prompt(tokenizer: Any, messages: list[Message]) -> str:
    """Messages in the form in which ``encode`` writes them, up to where the assistant's answer begins."""
    if not tokenizer.chat_template:
        return _plain(tokenizer, messages)
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def as_question(tokenizer: Any, prompt: str) -> str:
    """A prompt in the form in which ``encode`` writes what the user says, up to where the assistant begins."""
    return as_prompt(tokenizer, [question(prompt)])


def _plain(tokenizer: Any, messages: list[Message]) -> str:
    """Messages where there is no template: lines, and the token that ends a text after what the assistant says."""
    return "".join(m["content"] + ((m["role"] == "assistant" and tokenizer.eos_token) or "\n") for m in messages)


class _Rewritten(Exception):
    """A chat template that writes a question in another way once it is answered."""


def _asked_and_answered(
    tokenizer: Any, asked: list[Message], answer: Message, tools: list[Any] | None
) -> tuple[str, str]:
    """What the chat template writes up to an answer, and of the answer.

    Raises:
        _Rewritten: it leaves no place between the two.
    """
    if not tokenizer.chat_template:
        return _plain(tokenizer, asked), _plain(tokenizer, [answer])
    options = {"tokenize": False, **({"tools": tools} if tools else {})}
    both = tokenizer.apply_chat_template([*asked, answer], **options)
    if not asked:
        return "", both
    for begin in (True, False):  # some templates begin an answer in another way than they write one
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=begin, **options)
        if both.startswith(before):
            return before, both[len(before) :]
    raise _Rewritten


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _conversation_rows(tokenizer: Any, messages: list[Message], tools: list[Any] | None) -> list[Row]:
    """A conversation in whole rows: one, or more where the template writes earlier turns in another way than the last.

    Such a template leaves out the assistant's earlier thoughts, as an instance; each answer is learnt as it is asked
    for then, with the conversation before it as it is written there.
    """
    rows: list[Row] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _asked_and_answered(tokenizer, messages[:i], message, tools)
        if not rows or not before.startswith(written):
            rows.append({"input_ids": [], "labels": []})
            written = ""
        asked, answered = _tokens(tokenizer, before[len(written) :]), _tokens(tokenizer, after)
        rows[-1]["input_ids"] += asked + answered
        rows[-1]["labels"] += [-100] * len(asked) + answered
        written = before + after
    return rows


def _preference_row(tokenizer: Any, example: dict[str, Any]) -> Row:
    row: Row = {}
    for name in ("chosen", "rejected"):
        before, after = _asked_and_answered(tokenizer, example["prompt"], example[name][0], example.get("tools"))
        row |= {"prompt_ids": _tokens(tokenizer, before), f"{name}_ids": _tokens(tokenizer, after)}
    return row


def _cut(row: Row, seq_len: int) -> bool:
    """Cuts a row to ``seq_len`` tokens, and tells whether it was longer."""
    if "prompt_ids" not in row:
        longer = len(row["input_ids"]) > seq_len
        for key in row:
            del row[key][seq_len:]
        return longer
    room = max(0, seq_len - len(row["prompt_ids"]))
    longer = max(len(row["chosen_ids"]), len(row["rejected_ids"])) > room
    for key in ("chosen_ids", "rejected_ids"):
        del row[key][room:]
    return longer


def _teaches(row: Row) -> bool:
    if "prompt_ids" in row:
        return bool(row["prompt_ids"]) and row["chosen_ids"] != row["rejected_ids"]
    return any(label != -100 for label in row["labels"][1:])  # nothing predicts a first token


def _encode(tokenizer: Any, example: Example, preferences: bool) -> list[Row]:
    if isinstance(example, str):
        ids = tokenizer(example)["input_ids"]
        return [{"input_ids": ids, "labels": list(ids)}]
    if isinstance(example, list):
        return _conversation_rows(tokenizer, example, None)
    if is_conversation(example):
        return _conversation_rows(tokenizer, example["messages"], example.get("tools"))
    if preferences:
        return [_preference_row(tokenizer, example)]
    return _conversation_rows(tokenizer, example["prompt"] + example["chosen"], example.get("tools"))[-1:]


def encode(
    tokenizer: Any,
    examples: Iterable[Example],
    seq_len: int,
    counts: collections.Counter[str] | None = None,
    preferences: bool = True,
) -> Iterator[Row]:
    """The rows of examples, at most ``seq_len`` tokens long; a longer text makes several, all else is cut.

    Args:
        counts: of what was cut, and of what was left out because nothing is to be learnt from it, by the reason.
        preferences: whether preferences are kept as such, or what is chosen in them is learnt like any answer.
    """
    counts = collections.Counter() if counts is None else counts
    for example in examples:
        with tokenizing("--data"):
            try:
                rows = _encode(tokenizer, example, preferences)
            except _Rewritten:
                rows = []
                counts[_REWRITTEN] += 1
                continue
        if isinstance(example, str):
            for start in range(0, len(rows[0]["input_ids"]), seq_len):
                row = {key: ids[start : start + seq_len] for key, ids in rows[0].items()}
                if _teaches(row):
                    yield row
            counts[_NOTHING] += len(rows[0]["input_ids"]) < 2
            continue
        counts[_NOTHING] += not rows
        for row in rows:
            longer = _cut(row, seq_len)
            if _teaches(row):
                counts[CUT] += longer
                yield row
            else:
                counts[_BEYOND if longer else _SAME if "prompt_ids" in row else _NOTHING] += 1


def pack(rows: Iterable[Row], seq_len: int, most: int | None = None) -> Sequence[Row]:
    """Lays short rows end to end, up to ``seq_len``; ``position_ids`` begin anew with each, which keeps them apart.

    transformers reads those positions and lets no token attend to another row's.

    Args:
        most: packed rows that are wanted; all if None.
    """
    packed: Stored[Row] = Stored()
    last: Row = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        size = len(row["input_ids"])
        if last["input_ids"] and len(last["input_ids"]) + size > seq_len:
            packed.append(last)
            last = {"input_ids": [], "labels": [], "position_ids": []}
            if len(packed) == most:
                break
        last["input_ids"] += row["input_ids"]
        last["labels"] += [-100, *row["labels"][1:]]  # nothing before it predicts a first token
        last["position_ids"] += range(size)
    if last["input_ids"]:
        packed.append(last)
    return packed


@dataclasses.dataclass(frozen=True)
class Parts:
    """Rows to train on (packed, unless they are preferences), single ones held out, and what was cut or dropped."""

    train: Sequence[Row]
    held_out: list[Row]
    counts: collections.Counter[str]


def told(counts: collections.Counter[str], seq_len: int) -> list[str]:
    """How many examples were cut or dropped, and why."""
    names = {key: key.replace("--seq-len", f"--seq-len {seq_len}") for key in counts}
    return [f"{count:,} {names[key]}" for key, count in counts.most_common() if count]


def in_order(rows: Sequence[Any], seed: int) -> array.array[int]:
    """Numbers of rows, in an order drawn by ``seed``."""
    order = array.array("Q", range(len(rows)))
    random.Random(seed).shuffle(order)
    return order


def split(
    tokenizer: Any,
    examples: Sequence[Example],
    seq_len: int,
    train_rows: int | None,
    held_out_rows: int,
    seed: int,
    preferences: bool = False,
) -> Parts:
    """Rows to train on, and rows held out, in an order drawn by ``seed``.

    There are at most as many as asked for (None: all); where the data is short, a tenth of it is held out. Encoding
    stops as soon as there is enough.

    Raises:
        UserError: there are fewer than two; the text says what was left out.
    """
    counts: collections.Counter[str] = collections.Counter()
    rows: Stored[Row] = Stored()
    size = 0  # of what there is to train on: rows, of --seq-len tokens each where they are packed
    wanted = None if train_rows is None else train_rows * (1 if preferences else seq_len)
    whole = not any(isinstance(example, str) for example in examples)  # pieces of one text are to be shuffled first
    shuffled = (examples[i] for i in in_order(examples, seed))
    for row in encode(tokenizer, shuffled, seq_len, counts, preferences):
        rows.append(row)
        if len(rows) > held_out_rows:
            size += 1 if preferences else len(row["input_ids"])
        if whole and wanted is not None and size >= wanted:
            break
    else:
        held_out_rows = min(held_out_rows, max(1, len(rows) // 10))
    if len(rows) < 2:
        left_out = "".join(f"; {reason}" for reason in told(counts, seq_len))
        raise UserError(
            f"--data: too little text: {len(rows)} of {len(examples)} examples can be learnt from, at least two (or "
            f"--seq-len of text twice) are needed{left_out}"
        )
    order = range(len(rows)) if whole else in_order(rows, seed)
    held_out = [rows[i] for i in order[:held_out_rows]]
    train = (rows[i] for i in order[held_out_rows:])
    if not preferences:
        return Parts(pack(train, seq_len, train_rows), held_out, counts)
    kept: Stored[Row] = Stored()
    for row in itertools.islice(train, train_rows):
        kept.append(row)
    return Parts(kept, held_out, counts)
