"""Encodes examples with the model's tokenizer and chat template, and counts what is cut or dropped."""

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
from ..special_tokens import prompt_tokens, sequences, special_tokens, with_beginning
from .examples import Example, Message, is_conversation, is_labelled, question
from .store import Stored

# Lists of equal length: "input_ids", "labels" (-100: not learnt) and, in packed rows, "position_ids". A preference has
# "prompt_ids", "chosen_ids" and "rejected_ids" instead, a labelled answer "prompt_ids", "completion_ids" and "label" (a
# single 0 or 1).
Row: TypeAlias = "dict[str, list[int]]"

_ANSWERS = ("chosen", "rejected", "completion")
_PIECE = 1 << 20  # approximate number of characters per tokenizer call, which needs 70 times as many bytes
_MAX_TOKEN_CHARACTERS = 512  # characters, of any tokenizer known
CUT = "cut to --seq-len"
_ANSWER_BEYOND = "dropped: the answer begins beyond --seq-len"
_NOTHING_LEARNT = "dropped: nothing to learn (no answer of the assistant, or a single token)"
_REWRITTEN = "dropped: the chat template changes the question after it is answered"
_BAD_ANSWER = "dropped: the label calls the answer bad"
_SAME_ANSWERS = "dropped: chosen and rejected are the same, up to --seq-len"


@contextlib.contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """Turns any error of a tokenizer or chat template into a ``UserError`` about ``what``.

    Both come with the model's files, and may raise arbitrary exceptions.
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
    """Rejects conversations without a chat template, and tools that the chat template does not support.

    A single question and its answer need no template.

    Args:
        data, model: their names, for the error message.

    Raises:
        UserError: an example cannot be formatted.
    """
    for example in examples:
        if isinstance(example, str):
            continue
        if not tokenizer.chat_template:
            if is_conversation(example) or (isinstance(example, dict) and len(example["prompt"]) > 1):
                raise UserError(
                    f"--data {data} has conversations, but the tokenizer of {model} has no chat template; use a chat "
                    'model, or data with pairs ("prompt" and "completion") or "text"'
                )
            continue
        if isinstance(example, list):
            continue
        tools = example.get("tools")
        messages = example.get("messages") or [
            message for name in ("prompt", *_ANSWERS) for message in example.get(name, ())
        ]
        ignored = unsupported_part(tokenizer, messages, tools)
        if ignored is not None:
            raise UserError(f"--data {data} has {ignored}, which the chat template of {model} does not support")


def unsupported_part(tokenizer: Any, messages: Iterable[Message], tools: list[Any] | None) -> str | None:
    """What the tokenizer's chat template would ignore of a conversation: "tools", "tool_calls" or nothing."""
    template = str(tokenizer.get_chat_template(tools=tools)) if tokenizer.chat_template else ""
    there = {"tools": bool(tools), "tool_calls": any("tool_calls" in message for message in messages)}
    return next((name for name, found in there.items() if found and name not in template), None)


def as_prompt(tokenizer: Any, messages: list[Message], tools: list[Any] | None = None) -> str:
    """Messages, formatted as in ``encode``, up to the beginning of the assistant's answer."""
    if not tokenizer.chat_template:
        return _plain(tokenizer, messages)
    options = {"tokenize": False, "add_generation_prompt": True, **({"tools": tools} if tools else {})}
    text: str = tokenizer.apply_chat_template(messages, **options)
    return text


def as_question(tokenizer: Any, prompt: str) -> str:
    """A user's prompt, formatted as in ``encode``, up to the beginning of the assistant's answer."""
    return as_prompt(tokenizer, [question(prompt)])


def formatted_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text from ``as_prompt`` or ``as_question``."""
    return prompt_tokens(tokenizer, text, formatted=bool(tokenizer.chat_template))


def _plain(tokenizer: Any, messages: list[Message]) -> str:
    """Messages without a template: one line each, and the end-of-text token after those of the assistant."""
    return "".join(m["content"] + ((m["role"] == "assistant" and tokenizer.eos_token) or "\n") for m in messages)


class _Rewritten(Exception):
    """A chat template changes a question after it is answered."""


def _split_at_answer(tokenizer: Any, asked: list[Message], answer: Message, tools: list[Any] | None) -> tuple[str, str]:
    """The formatted text before an answer, and that of the answer.

    Raises:
        _Rewritten: the text with the answer does not begin with the text before it.
    """
    if not tokenizer.chat_template:
        return _plain(tokenizer, asked), _plain(tokenizer, [answer])
    options = {"tokenize": False, **({"tools": tools} if tools else {})}
    both = tokenizer.apply_chat_template([*asked, answer], **options)
    if not asked:
        return "", both
    for begin in (True, False):  # with some templates, the generation prompt differs from the beginning of an answer
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=begin, **options)
        if both.startswith(before):
            return before, both[len(before) :]
    raise _Rewritten


def _tokens(tokenizer: Any, text: str, seq_len: int) -> list[int]:
    """The tokens of a text, or of a prefix with more than ``seq_len`` tokens, which the caller then cuts."""
    ids: list[int] = tokenizer(text[: _PIECE + _MAX_TOKEN_CHARACTERS * seq_len], add_special_tokens=False)["input_ids"]
    return ids


def _pieces(text: str) -> Iterator[str]:
    """Splits a long text into pieces of about ``_PIECE`` characters, at line ends or, in a long line, after a word."""
    begin = 0
    while len(text) - begin > 2 * _PIECE:
        end = begin + _PIECE
        cut = max(text.rfind("\n", begin, end), 0) or max(text.rfind(" ", begin, end), 0) or end - 1
        yield text[begin : cut + 1]
        begin = cut + 1
    yield text[begin:]


def _has_content(message: Message) -> bool:
    said = (message["content"], message.get("reasoning_content"), message.get("thinking"))
    return bool(message.get("tool_calls")) or any(text and text.strip() for text in said)


def _conversation_rows(tokenizer: Any, messages: list[Message], tools: list[Any] | None, seq_len: int) -> list[Row]:
    """The rows of a conversation: one, or several if the template formats earlier turns differently from the last.

    Some templates omit the reasoning of earlier answers, for example. Each answer is then learnt after the conversation
    as it is formatted at that point.
    """
    rows: list[Row] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _split_at_answer(tokenizer, messages[:i], message, tools)
        if not rows or not before.startswith(written):
            rows.append({"input_ids": [], "labels": []})
            written = ""
        asked, answered = _tokens(tokenizer, before[len(written) :], seq_len), _tokens(tokenizer, after, seq_len)
        rows[-1]["input_ids"] += asked + answered
        rows[-1]["labels"] += [-100] * len(asked)
        rows[-1]["labels"] += answered if _has_content(message) else [-100] * len(answered)
        written = before + after
    return rows


def _row_of_answers(tokenizer: Any, example: dict[str, Any], seq_len: int) -> Row:
    """The row of a preference or a labelled answer."""
    row: Row = {}
    for name in filter(example.__contains__, _ANSWERS):
        before, after = _split_at_answer(tokenizer, example["prompt"], example[name][0], example.get("tools"))
        row |= {"prompt_ids": _tokens(tokenizer, before, seq_len), f"{name}_ids": _tokens(tokenizer, after, seq_len)}
    return row | ({"label": [int(example["label"])]} if is_labelled(example) else {})


def answers_of(row: Row) -> list[list[int]]:
    """The tokens of the answers in the row of a preference or a labelled answer."""
    return [row[key] for key in (f"{name}_ids" for name in _ANSWERS) if key in row]


def _begin(row: Row, beginning: list[int]) -> None:
    """Puts special tokens before a row, unless it has them already. They are not learnt."""
    key = "prompt_ids" if "prompt_ids" in row else "input_ids"
    ids = with_beginning(row[key], beginning)
    if "labels" in row:
        row["labels"] = [-100] * (len(ids) - len(row[key])) + row["labels"]
    row[key] = ids


def _cut(row: Row, seq_len: int) -> bool:
    """Cuts a row to ``seq_len`` tokens. Returns whether it was longer."""
    if "prompt_ids" not in row:
        longer = len(row["input_ids"]) > seq_len
        for key in row:
            del row[key][seq_len:]
        return longer
    room = max(0, seq_len - len(row["prompt_ids"]))
    answers = answers_of(row)
    longer = max(map(len, answers)) > room
    for ids in answers:
        del ids[room:]
    return longer


def _has_learnt_tokens(row: Row) -> bool:
    if "prompt_ids" in row:
        first, *other = answers_of(row)
        return bool(row["prompt_ids"]) and [first] != (other or [[]])
    return any(label != -100 for label in row["labels"][1:])  # the first token is never predicted


def _encode(tokenizer: Any, example: list[Message] | dict[str, Any], preferences: bool, seq_len: int) -> list[Row]:
    if isinstance(example, list):
        return _conversation_rows(tokenizer, example, None, seq_len)
    if is_conversation(example):
        return _conversation_rows(tokenizer, example["messages"], example.get("tools"), seq_len)
    answer = example["completion" if is_labelled(example) else "chosen"]
    if not _has_content(answer[-1]) and example.get("label", True):
        return []
    if preferences:
        return [_row_of_answers(tokenizer, example, seq_len)]
    return _conversation_rows(tokenizer, example["prompt"] + answer, example.get("tools"), seq_len)[-1:]


def _text_rows(
    tokenizer: Any, text: str, seq_len: int, counts: collections.Counter[str], beginning: list[int], end: list[int]
) -> Iterator[Row]:
    """The rows of a text, of ``seq_len`` tokens each. All tokens are learnt.

    Args:
        beginning: the special tokens before each row. Rows inside the text have them too, because a model that has
            never seen a text without them predicts badly without them.
        end: the special tokens after the text.
    """
    size, remaining = 0, len(text)
    for piece in _pieces(text):
        with tokenizing("--data"):
            ids: list[int] = tokenizer(piece, add_special_tokens=False)["input_ids"]
        remaining -= len(piece)
        if ids and not remaining and ids[len(ids) - len(end) :] != end:
            ids += end
        for part in sequences(ids, seq_len, beginning):
            size += len(part)
            row = {"input_ids": part, "labels": list(part)}
            if _has_learnt_tokens(row):
                yield row
    counts[_NOTHING_LEARNT] += size < 2


def encode(
    tokenizer: Any,
    examples: Iterable[Example],
    seq_len: int,
    counts: collections.Counter[str] | None = None,
    preferences: bool = True,
) -> Iterator[Row]:
    """The rows of examples, at most ``seq_len`` tokens long. Longer texts give several rows; other examples are cut.

    Args:
        counts: receives the numbers of cut and dropped examples, by reason.
        preferences: whether preferences and labels are retained. Otherwise the chosen or good answer is learnt like
            any answer, and bad answers are dropped.
    """
    counts = collections.Counter() if counts is None else counts
    with tokenizing("--data"):
        ends = special_tokens(tokenizer)
        beginning, _ = special_tokens(tokenizer, formatted=bool(tokenizer.chat_template))
    for example in examples:
        if isinstance(example, str):
            yield from _text_rows(tokenizer, example, seq_len, counts, *ends)
            continue
        if not preferences and is_labelled(example) and not example["label"]:
            counts[_BAD_ANSWER] += 1
            continue
        with tokenizing("--data"):
            try:
                rows = _encode(tokenizer, example, preferences, seq_len)
            except _Rewritten:
                rows = []
                counts[_REWRITTEN] += 1
                continue
        counts[_NOTHING_LEARNT] += not rows
        for row in rows:
            _begin(row, beginning)
            longer = _cut(row, seq_len)
            if _has_learnt_tokens(row):
                counts[CUT] += longer
                yield row
            else:
                counts[_ANSWER_BEYOND if longer else _SAME_ANSWERS if "rejected_ids" in row else _NOTHING_LEARNT] += 1


def pack(rows: Iterable[Row], seq_len: int, max_rows: int | None = None) -> Sequence[Row]:
    """Packs short rows into rows of up to ``seq_len`` tokens. ``position_ids`` restart at each original row.

    transformers derives the attention mask from the positions, so no token attends to another original row.

    Args:
        rows: some may be packed already.
        max_rows: the maximum number of packed rows; None for all.
    """
    packed: Stored[Row] = Stored()
    last: Row = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        size = len(row["input_ids"])
        if last["input_ids"] and len(last["input_ids"]) + size > seq_len:
            packed.append(last)
            last = {"input_ids": [], "labels": [], "position_ids": []}
            if len(packed) == max_rows:
                break
        last["input_ids"] += row["input_ids"]
        last["labels"] += [-100, *row["labels"][1:]]  # the first token is not predicted from the previous row
        last["position_ids"] += row.get("position_ids", range(size))
    if last["input_ids"]:
        packed.append(last)
    return packed


@dataclasses.dataclass(frozen=True)
class Parts:
    """Rows to train on (packed, unless they have ``prompt_ids``), held-out rows (never packed), counts by reason."""

    train: Sequence[Row]
    held_out: list[Row]
    counts: collections.Counter[str]


def summary(counts: collections.Counter[str], seq_len: int) -> list[str]:
    """Lines that report how many examples were cut or dropped, and why."""
    names = {key: key.replace("--seq-len", f"--seq-len {seq_len}") for key in counts}
    return [f"{count:,} {names[key]}" for key, count in counts.most_common() if count]


def in_order(rows: Sequence[Any], seed: int) -> array.array[int]:
    """The indices of ``rows``, shuffled by ``seed``."""
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
    first_rows: int | None = None,
    packing: bool = True,
) -> Parts:
    """Encodes examples, in an order shuffled by ``seed``, into rows to train on and held-out rows.

    Encoding stops when there are enough rows. If there is too little data, a tenth of it is held out.

    Args:
        train_rows: maximum number of rows to train on; None for all.
        held_out_rows: maximum number of held-out rows.
        first_rows: the ``train_rows`` with which an extended run was started, so that the same rows are held out.
        packing: pack short rows, up to ``seq_len``.

    Raises:
        UserError: there are fewer than two rows; the message says what was dropped.
    """
    counts: collections.Counter[str] = collections.Counter()
    rows: Stored[Row] = Stored()
    size = 0  # of the training data: tokens if rows are packed, else rows
    row_tokens = seq_len if packing and not preferences else 1
    wanted = None if train_rows is None else train_rows * row_tokens
    wanted_first = wanted if first_rows is None else first_rows * row_tokens
    are_texts = any(isinstance(example, str) for example in examples)  # whose pieces are to be shuffled first
    shuffled = (examples[i] for i in in_order(examples, seed))
    for row in encode(tokenizer, shuffled, seq_len, counts, preferences):
        rows.append(row)
        if len(rows) > held_out_rows:
            size += 1 if row_tokens == 1 else len(row["input_ids"])
        if not are_texts and wanted is not None and size >= wanted:
            break
    if are_texts or wanted_first is None or size < wanted_first:
        held_out_rows = min(held_out_rows, max(1, len(rows) // 10))
    if len(rows) < 2:
        left_out = "".join(f"; {reason}" for reason in summary(counts, seq_len))
        raise UserError(
            f"--data: too little text: {len(rows)} of {len(examples)} examples are usable, at least two (or "
            f"twice --seq-len of text) are needed{left_out}"
        )
    order = in_order(rows, seed) if are_texts else range(len(rows))
    held_out = [rows[i] for i in order[:held_out_rows]]
    train = (rows[i] for i in order[held_out_rows:])
    if not preferences and packing:
        return Parts(pack(train, seq_len, train_rows), held_out, counts)
    selected: Iterable[Row] = itertools.islice(train, train_rows)
    if not preferences:
        selected = ({**row, "position_ids": list(range(len(row["input_ids"])))} for row in selected)
    return Parts(Stored(selected), held_out, counts)
