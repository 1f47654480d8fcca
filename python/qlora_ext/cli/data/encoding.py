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

_PIECE = 1 << 20  # characters of a text that go to the tokenizer at once, about: it takes 70 times as many bytes
_LONGEST_TOKEN = 512  # characters, of any tokenizer known
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
                    f"--data {data} holds conversations, and the tokenizer of {model} has no chat template; take a "
                    'chat model, or data of pairs ("prompt" and "completion") or "text"'
                )
            continue
        if isinstance(example, list):
            continue
        tools = example.get("tools")
        messages = example.get("messages") or [*example["prompt"], *example["chosen"], *example["rejected"]]
        template = str(tokenizer.get_chat_template(tools=tools))
        for name, there in (("tools", tools), ("tool_calls", any("tool_calls" in m for m in messages))):
            if there and name not in template:
                raise UserError(f"--data {data} holds {name}, which the chat template of {model} does not support")


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


def _tokens(tokenizer: Any, text: str, seq_len: int) -> list[int]:
    """The tokens of a text, or of a beginning with more than ``seq_len`` tokens, which the caller then cuts."""
    ids: list[int] = tokenizer(text[: _PIECE + _LONGEST_TOKEN * seq_len], add_special_tokens=False)["input_ids"]
    return ids


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces of about ``_PIECE`` characters that end with a line or, in a long line, with a word."""
    begin = 0
    while len(text) - begin > 2 * _PIECE:
        end = begin + _PIECE
        cut = max(text.rfind("\n", begin, end), 0) or max(text.rfind(" ", begin, end), 0) or end - 1
        yield text[begin : cut + 1]
        begin = cut + 1
    yield text[begin:]


def _says_something(message: Message) -> bool:
    said = (message["content"], message.get("reasoning_content"), message.get("thinking"))
    return bool(message.get("tool_calls")) or any(text and text.strip() for text in said)


def _conversation_rows(tokenizer: Any, messages: list[Message], tools: list[Any] | None, seq_len: int) -> list[Row]:
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
        asked, answered = _tokens(tokenizer, before[len(written) :], seq_len), _tokens(tokenizer, after, seq_len)
        rows[-1]["input_ids"] += asked + answered
        rows[-1]["labels"] += [-100] * len(asked)
        rows[-1]["labels"] += answered if _says_something(message) else [-100] * len(answered)
        written = before + after
    return rows


def _preference_row(tokenizer: Any, example: dict[str, Any], seq_len: int) -> Row:
    row: Row = {}
    for name in ("chosen", "rejected"):
        before, after = _asked_and_answered(tokenizer, example["prompt"], example[name][0], example.get("tools"))
        row |= {"prompt_ids": _tokens(tokenizer, before, seq_len), f"{name}_ids": _tokens(tokenizer, after, seq_len)}
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


def _encode(tokenizer: Any, example: list[Message] | dict[str, Any], preferences: bool, seq_len: int) -> list[Row]:
    if isinstance(example, list):
        return _conversation_rows(tokenizer, example, None, seq_len)
    if is_conversation(example):
        return _conversation_rows(tokenizer, example["messages"], example.get("tools"), seq_len)
    if not _says_something(example["chosen"][-1]):
        return []
    if preferences:
        return [_preference_row(tokenizer, example, seq_len)]
    return _conversation_rows(tokenizer, example["prompt"] + example["chosen"], example.get("tools"), seq_len)[-1:]


def _text_rows(tokenizer: Any, text: str, seq_len: int, counts: collections.Counter[str]) -> Iterator[Row]:
    """A text, every token of which is learnt, in rows of ``seq_len`` tokens."""
    size = 0
    for piece in _pieces(text):
        with tokenizing("--data"):
            ids: list[int] = tokenizer(piece)["input_ids"]
        size += len(ids)
        for start in range(0, len(ids), seq_len):
            part = ids[start : start + seq_len]
            row = {"input_ids": part, "labels": list(part)}
            if _teaches(row):
                yield row
    counts[_NOTHING] += size < 2


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
        if isinstance(example, str):
            yield from _text_rows(tokenizer, example, seq_len, counts)
            continue
        with tokenizing("--data"):
            try:
                rows = _encode(tokenizer, example, preferences, seq_len)
            except _Rewritten:
                rows = []
                counts[_REWRITTEN] += 1
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


def summary(counts: collections.Counter[str], seq_len: int) -> list[str]:
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
    first_rows: int | None = None,
    packing: bool = True,
) -> Parts:
    """Rows to train on, and rows held out, in an order drawn by ``seed``.

    There are at most as many as asked for (None: all); where the data is short, a tenth of it is held out. Encoding
    stops as soon as there is enough.

    Args:
        first_rows: as many as ``train_rows`` was when the run was begun, if it was made longer: what was held out then
            stays held out.
        packing: put short rows into one, up to ``seq_len``.

    Raises:
        UserError: there are fewer than two; the text says what was left out.
    """
    counts: collections.Counter[str] = collections.Counter()
    rows: Stored[Row] = Stored()
    size = 0  # of what there is to train on: rows, of --seq-len tokens each where they are packed
    a_row = seq_len if packing and not preferences else 1
    wanted = None if train_rows is None else train_rows * a_row
    wanted_first = wanted if first_rows is None else first_rows * a_row
    examples_are_parsed = not any(
        isinstance(example, str) for example in examples
    )  # pieces of one text are to be shuffled first
    shuffled = (examples[i] for i in in_order(examples, seed))
    for row in encode(tokenizer, shuffled, seq_len, counts, preferences):
        rows.append(row)
        if len(rows) > held_out_rows:
            size += 1 if a_row == 1 else len(row["input_ids"])
        if examples_are_parsed and wanted is not None and size >= wanted:
            break
    if not examples_are_parsed or wanted_first is None or size < wanted_first:
        held_out_rows = min(held_out_rows, max(1, len(rows) // 10))
    if len(rows) < 2:
        left_out = "".join(f"; {reason}" for reason in summary(counts, seq_len))
        raise UserError(
            f"--data: too little text: {len(rows)} of {len(examples)} examples are usable, at least two (or "
            f"twice --seq-len of text) are needed{left_out}"
        )
    order = range(len(rows)) if examples_are_parsed else in_order(rows, seed)
    held_out = [rows[i] for i in order[:held_out_rows]]
    train = (rows[i] for i in order[held_out_rows:])
    if not preferences and packing:
        return Parts(pack(train, seq_len, train_rows), held_out, counts)
    kept: Stored[Row] = Stored()
    for row in itertools.islice(train, train_rows):
        kept.append(row if preferences else {**row, "position_ids": list(range(len(row["input_ids"])))})
    return Parts(kept, held_out, counts)
