"""The text to learn: files, and packages that carry openly licensed text.

An example is either a plain text, every token of which is learnt, or a conversation (messages with the roles "user"
and "assistant"), of which the assistant's words alone are.
"""

from __future__ import annotations

import contextlib
import gzip
import pathlib
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from .._outside import FileError, Schema, check, excerpt, parse_json, printable, read_text
from .errors import UserError, first_line, is_panic, path_named
from .sources import PACKAGE, package_files

Message: TypeAlias = dict[str, str]
Example: TypeAlias = "str | list[Message]"

DEFAULT_DATA = f"{PACKAGE}chitchat-dataset"
# The columns by which published datasets call a question and its answer.
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_ROLES = {"human": "user", "gpt": "assistant"}
_MAX_BYTES = 16 << 30  # of a file of text, which is read whole
_CHITCHAT: Schema = {"messages": [[{"text": str}]]}


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(turns: Any) -> list[Message] | None:
    if not isinstance(turns, list):
        return None
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def _from_record(record: Any) -> Example | None:
    """An example from one line of a .jsonl file, or None if its columns are unknown."""
    if not isinstance(record, dict):
        return None
    for key in ("messages", "conversations"):
        if key in record:
            return _messages(record[key])
    if isinstance(record.get("text"), str):
        return str(record["text"])
    for question, answer in _PAIRS:
        if isinstance(record.get(question), str) and isinstance(record.get(answer), str):
            more = record.get("input")
            if not isinstance(more, str | None):
                return None
            asked = "\n\n".join(filter(None, (record[question], more)))
            return _pair(asked, record[answer])
    return None


def _read_jsonl(path: pathlib.Path) -> Iterator[Example]:
    # JSON's own lines: other characters that end a line may stand in a text.
    for number, line in enumerate(read_text(path, _MAX_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        source = f"--data {printable(path)}, line {number}"
        example = _from_record(parse_json(line, source))
        if example is None:
            raise UserError(
                f'{source}: expected an object with "text", "messages", or a pair such as "prompt" and "completion", '
                f"got {excerpt(line)}"
            )
        yield example


def _read_txt(path: pathlib.Path) -> Iterator[Example]:
    text = read_text(path, _MAX_BYTES)
    if text.strip():
        yield text


def _chitchat() -> Iterator[Example]:
    """chitchat-dataset (MIT): conversations of two people, the second of whom is the assistant."""
    paths = package_files("chitchat-dataset", "the text")
    path = next((p for p in paths if p.name == "dataset.json"), None)
    if path is None or not path.is_file():
        raise UserError(f"--data {DEFAULT_DATA}: the package carries no dataset.json")
    found = parse_json(read_text(path), printable(path), dict)
    for name, conversation in found.items():
        check(conversation, _CHITCHAT, printable(path), excerpt(name))
        turns = [" ".join(line["text"] for line in turn) for turn in conversation["messages"]]
        if len(turns) > 1:
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def _dictd_number(digits: str) -> int:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + alphabet.index(digit)
    return value


def _dictd_entry(line: str) -> tuple[int, int]:
    """Where an entry begins and how long it is, from a line of the index: the term, offset and size."""
    _, start, size = line.split("\t")[:3]
    if not (start and size):
        raise ValueError(line)
    return _dictd_number(start), _dictd_number(size)


def _read_dictd(path: pathlib.Path) -> Iterator[Example]:
    """A dictd dictionary (.dict.dz beside its .index): a term is the question, its definition the answer."""
    index = path.with_name(path.name.removesuffix(".dz").removesuffix(".dict") + ".index")
    try:
        with gzip.open(path) as file:
            body = file.read(_MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--data {path}: no readable dictionary ({first_line(error)})") from error
    entries = set()
    for number, line in enumerate(read_text(index).splitlines(), 1):
        try:
            offset, size = _dictd_entry(line)
        except ValueError:
            raise UserError(f"--data {index}, line {number}: no entry of a dictd index: {excerpt(line)}") from None
        if offset + size > len(body):
            raise UserError(f"--data {index}, line {number}: its entry lies beyond the end of {path.name}")
        entries.add((offset, size))
    for offset, size in sorted(entries):
        entry = body[offset : offset + size].decode("utf-8", "replace")
        term, _, definition = entry.partition("\n")
        definition = re.sub(r"\s+", " ", definition).strip()
        if definition and not term.startswith("00-database"):
            yield _pair(term.strip(), definition)


def _jargon() -> Iterator[Example]:
    """The Jargon File (public domain), where Debian's dict-jargon puts it."""
    path = pathlib.Path("/usr/share/dictd/jargon.dict.dz")
    if not path.is_file():
        raise UserError(
            f"the text {PACKAGE}dict-jargon is not installed here; install it with: apt-get install dict-jargon"
        )
    return _read_dictd(path)


_PACKAGES: dict[str, Callable[[], Iterator[Example]]] = {"chitchat-dataset": _chitchat, "dict-jargon": _jargon}


def read_examples(name: str) -> list[Example]:
    """All examples of ``--data name``: a .jsonl, .txt or .dict.dz file, or package:NAME.

    Raises:
        UserError: no such file or package, nothing in it, or a line that is no example; the text says which.
    """
    if name.startswith(PACKAGE):
        package = name.removeprefix(PACKAGE)
        if package not in _PACKAGES:
            known = ", ".join(PACKAGE + p for p in _PACKAGES)
            raise UserError(f"--data {name}: unknown package; known are {known}, or name a .jsonl or .txt file")
        examples = list(_PACKAGES[package]())
    else:
        path = path_named(name, "--data")
        if not path.is_file():
            raise UserError(f"--data {name}: no such file")
        readers = {".dict.dz": _read_dictd, ".jsonl": _read_jsonl, ".txt": _read_txt}
        reader = next((readers[end] for end in readers if path.name.endswith(end)), None)
        if reader is None:
            raise UserError(f"--data {name}: expected a name that ends in .jsonl, .txt or .dict.dz")
        try:
            examples = list(reader(path))
        except FileError as error:
            raise UserError(str(error) if "--data" in str(error) else f"--data {error}") from error
    if not examples:
        raise UserError(f"--data {name}: the dataset is empty")
    return examples


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


def as_question(tokenizer: Any, prompt: str) -> str:
    """A prompt in the form in which ``encode`` writes what the user says, up to where the assistant begins."""
    if not tokenizer.chat_template:
        return prompt + "\n"
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _segments(tokenizer: Any, messages: list[Message]) -> Iterator[tuple[str, bool]]:
    """The conversation as the model's chat template writes it, in pieces: the text, and whether it is learnt."""
    if not tokenizer.chat_template:
        for message in messages:
            answer = message["role"] == "assistant"
            yield message["content"] + (tokenizer.eos_token if answer and tokenizer.eos_token else "\n"), answer
        return
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (before.startswith(written) and after.startswith(before)):
            return  # a template that rewrites earlier turns: what was written so far stands
        yield before[len(written) :], False
        yield after[len(before) :], True
        written = after


def _encode(tokenizer: Any, example: Example, seq_len: int) -> Iterator[dict[str, list[int]]]:
    if isinstance(example, str):
        ids = tokenizer(example)["input_ids"]
        for start in range(0, len(ids), seq_len):
            part = ids[start : start + seq_len]
            yield {"input_ids": part, "labels": list(part)}
        return
    tokens: list[int] = []
    labels: list[int] = []
    for text, learnt in _segments(tokenizer, example):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        labels += ids if learnt else [-100] * len(ids)
        if len(tokens) >= seq_len:
            break
    yield {"input_ids": tokens[:seq_len], "labels": labels[:seq_len]}


def encode(tokenizer: Any, examples: Iterable[Example], seq_len: int) -> Iterator[dict[str, list[int]]]:
    """Token ids and labels (-100: not learnt), at most ``seq_len`` long; what has nothing to learn is left out."""
    for example in examples:
        with tokenizing("--data"):
            rows = list(_encode(tokenizer, example, seq_len))
        for row in rows:
            if any(label != -100 for label in row["labels"][1:]):
                yield row


Row: TypeAlias = "dict[str, list[int]]"


def pack(rows: Iterable[Row], seq_len: int) -> list[Row]:
    """Lays short rows end to end, up to ``seq_len``; ``position_ids`` begin anew with each, which keeps them apart.

    transformers reads those positions and lets no token attend to another row's.
    """
    packed: list[Row] = []
    for row in rows:
        size = len(row["input_ids"])
        if not packed or len(packed[-1]["input_ids"]) + size > seq_len:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        packed[-1]["input_ids"] += row["input_ids"]
        packed[-1]["labels"] += [-100, *row["labels"][1:]]  # nothing before it predicts a first token
        packed[-1]["position_ids"] += range(size)
    return packed


def split(
    tokenizer: Any, examples: list[Example], seq_len: int, train_rows: int, held_out_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Packed rows to train on, and single ones held out, in an order drawn by ``seed``.

    There are at most as many as asked for; where the data is short, a tenth of it is held out. Encoding stops as soon
    as there is enough.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    rows: list[Row] = []
    tokens = 0  # of the rows to train on
    may_stop = all(isinstance(example, list) for example in examples)  # pieces of one text are to be shuffled first
    for row in encode(tokenizer, shuffled, seq_len):
        rows.append(row)
        tokens += len(row["input_ids"]) if len(rows) > held_out_rows else 0
        if may_stop and tokens >= train_rows * seq_len:
            break
    else:
        held_out_rows = min(held_out_rows, max(1, len(rows) // 10))
    if len(rows) < 2:
        raise UserError("--data: too little text: at least two examples (or --seq-len of text twice) are needed")
    if not may_stop:
        random.Random(seed).shuffle(rows)
    return pack(rows[held_out_rows:], seq_len)[:train_rows], rows[:held_out_rows]
