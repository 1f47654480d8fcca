"""``--data``: every kind of file is read in bounded memory, or rejected with its row and what was expected."""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from qlora_app.data import directory, hub, read_examples
from qlora_app.data.store import Stored
from qlora_app.errors import UserError

Content: TypeAlias = "bytes | str | Callable[[], bytes]"
PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LINE = b'{"prompt": "a", "completion": "b"}\n'
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
TALKS = [TALK, {"messages": [*TALK["messages"], {"role": "tool", "content": "5", "name": "add"}]}] * 400
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SAID = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
    {"role": "assistant", "content": "two", "reasoning_content": "easy"},
]
OPENAI = [  # the same, as OpenAI writes it
    SAID[0],
    {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1"}]},
    {**SAID[2], "content": None, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}]},
    *SAID[3:],
]
ASKED, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
)
PREFERENCE = {"prompt": "q", "chosen": "y", "rejected": "n"}
LABELLED = {"prompt": "a", "completion": "b", "label": True}
GOOD = {"prompt": [PAIR[0]], "completion": [PAIR[1]], "label": True}


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table: Any) -> bytes:
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def parquet_of(*columns: tuple[str, list[Any]]) -> Callable[[], bytes]:
    def content() -> bytes:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        return parquet(pyarrow.table([values for _, values in columns], names=[name for name, _ in columns]))

    return content


def talks(form: str) -> bytes:
    """``TALKS`` with a column "id", in Parquet or in Arrow's form for streams or for files."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pyarrow.Table.from_pylist(TALKS).append_column("id", [list(range(len(TALKS)))])
    return parquet(table) if form == "parquet" else arrow(table, form)


def arrow(table: Any, form: str = "stream") -> bytes:
    from pyarrow import ipc

    file = io.BytesIO()
    with getattr(ipc, f"new_{form}")(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def arrow_outside() -> bytes:
    """An Arrow stream whose third text lies outside the file."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    data = arrow(pyarrow.table({"text": ["a"] * 9}))
    offsets = struct.pack("<4i", 0, 1, 2, 3)
    assert offsets in data
    return data.replace(offsets, struct.pack("<4i", 0, 1, 2**31 - 1, 3), 1)


def read(directory: pathlib.Path, name: str, content: Content, **options: str) -> list[Any]:
    path = directory / name
    content = content() if callable(content) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_examples(str(path), **options))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_pairs_in_every_kind_of_text_file(tmp_path: pathlib.Path, mark: bytes, end: bytes) -> None:
    array = b"[" + LINE + b"," + LINE + b"]"
    for name, content in {
        "a.jsonl": LINE * 2,
        "a.ndjson": LINE * 2,
        "lines.json": LINE * 2,
        "array.json": array,
        "splits.json": b'{"test": [' + LINE + b'],\n "train": ' + array + b"}",
        "wrapped.json": b'{"version": 1, "data": ' + array + b"}",
        "a.csv": b'"prompt",completion\na,b\n\n"a","b"\n',
        "semicolons.csv": b"prompt;completion\na;b\na;b",
        "a.tsv": b"prompt\tcompletion\na\tb\na\tb\n",
    }.items():
        content = mark + content.replace(b"\n", end)
        assert read(tmp_path, name, content) == [PAIR, PAIR], name
        assert read(tmp_path, f"{name}.gz", gzip.compress(content)) == [PAIR, PAIR], name
    text = read(tmp_path, "a.txt", mark + b"one" + end + b"two" + end)
    assert text == [f"one{end.decode()}two{end.decode()}"]


# Characters that end a line elsewhere; the last ones JSON files may contain unescaped.
ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", f'{{"text": "{ENDS}"}}\n' * 2, [ENDS] * 2),
        ("a.json", f'[{{"text": "{ENDS}"}}]', [ENDS]),
        ("a.json", jsonl({"text": "a"}), ["a"]),
        ("a.csv", f'text\n"{ENDS}"\n', [ENDS]),
        ("a.csv", 'prompt,completion,id\r\n"say ""a"", twice","b\r\nc\rd",1\r\n,' + "x" * 200_000 + ",NA\r\n", [
            [{"role": "user", "content": 'say "a", twice'}, {"role": "assistant", "content": "b\r\nc\rd"}],
            [{"role": "user", "content": ""}, {"role": "assistant", "content": "x" * 200_000}],
        ]),
        ("a.csv", "prompt,completion\r01,NA\r2021-01-01,null\r", [
            [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
            for a, b in (("01", "NA"), ("2021-01-01", "null"))
        ]),
        ("a.csv", 'messages\n"' + json.dumps(TALK["messages"]).replace('"', '""') + '"\n', [TALK]),
        ("a.csv", "prompt,completion,label\na,b,false\na,b,0\n", [GOOD | {"label": False}] * 2),
        ("a.parquet", lambda: talks("parquet"), TALKS),
        ("a.arrow", lambda: talks("stream"), TALKS),
        # Published layouts of one example, and types that differ between rows.
        ("a.jsonl", jsonl(
            {"messages": SAID, "tools": TOOLS},
            {"messages": OPENAI, "tools": json.dumps(TOOLS)},
            {"messages": SAID[1:], "system": "be brief", "tools": TOOLS},
            {"prompt": SAID[:-1], "completion": SAID[-1:], "tools": TOOLS},
        ), [{"messages": SAID, "tools": TOOLS}] * 4),
        ("a.jsonl", jsonl({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}), [TALK]),
        ("a.jsonl", jsonl({"text": "2021-01-01"}, {"text": "2021-01-02"}), ["2021-01-01", "2021-01-02"]),
        ("a.jsonl", jsonl(
            PREFERENCE,
            {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
            {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
            {"prompt": "q", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
            {"question": "q", "chosen": "y", "rejected": "n"},
        ), [{"prompt": [ASKED], "chosen": [YES], "rejected": [NO]}] * 5),
        ("a.jsonl", jsonl(
            LABELLED,
            {"prompt": [PAIR[0]], "completion": [PAIR[1]], "label": 1},
            {"question": "a", "answer": "b", "label": "True"},
            {"messages": PAIR, "label": True},
        ), [GOOD] * 4),
        # Columns and keys that may be ignored.
        ("a.jsonl", jsonl(
            {"text": "a", "label": 3},
            {"text": "a", "label": "spam", "images": []},
            {"messages": PAIR, "weight": 2},
            {"messages": [{**PAIR[0], "train": False}, {**PAIR[1], "weight": 1, "train": True}]},
        ), ["a", "a", {"messages": PAIR}, {"messages": PAIR}]),
    ],
)  # fmt: skip
def test_data_that_are_read(tmp_path: pathlib.Path, name: str, content: Content, rows: list[Any]) -> None:
    assert read(tmp_path, name, content) == rows


def refusal(directory: pathlib.Path, name: str, content: Content, **options: str) -> str:
    """The error for data that are rejected."""
    with pytest.raises(UserError) as refusal:
        read(directory, name, content, **options)
    sentence = str(refusal.value)
    assert str(directory / name) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", LINE + b'{"prompt": "a"\n', ["line 2", "not JSON"]),
        ("a.jsonl", LINE + b"\n" + b'{"prompt": "a"}\n', ["line 3", '"completion"', "got", "'prompt'"]),
        ("a.jsonl", b'{"prompt": "a", "completion": null}', ["line 1", "'completion' (null)"]),
        ("a.jsonl", LINE + '{"text": "é"}\n'.encode("latin-1"), ["line 2", "UTF-8", "0xe9"]),
        ("a.jsonl", LINE.decode().encode("utf-16"), ["UTF-8", "UTF-16"]),
        ("a.jsonl", gzip.compress(LINE, mtime=0), ["UTF-8", "gzip"]),
        ("a.jsonl.gz", gzip.compress(LINE * 9, mtime=0)[:-9], ["gzip"]),
        ("a.jsonl.gz", LINE, ["gzip"]),
        ("a.jsonl", jsonl(PREFERENCE) + LINE, ["line 2: expected a preference"]),
        ("a.jsonl", LINE + jsonl(PREFERENCE), ["line 2: expected no preference"]),
        ("a.jsonl", jsonl(LABELLED, LABELLED | {"label": None}), ["line 2: expected an answer with a label"]),
        ("a.jsonl", LINE + jsonl(LABELLED), ["line 2", "got an answer with a label"]),
        ("a.json", b'[\n{"text": "a"},\n{"words": "b"}\n]', ["row 2", "'words'"]),
        ("a.json", b'[\n{"text": "a"},\n{"text": "b"', ["line 3", "not JSON"]),
        ("a.json", b'{"test": [], "dev": []}', ["train", "test, dev"]),
        ("a.json", b'{"test": [\n{"text": "a"},\n 5]}', ["row 2", "got 5"]),
        ("a.json", b'[{"text": "a"}] [', ["not JSON", "Extra data"]),
        ("a.json", '[\n{"text": "é"}]'.encode("latin-1"), ["UTF-8", "0xe9"]),
        ("a.json", b"5", ["array"]),
        ("a.json", b"", ["not JSON"]),
        ("a.json", b"[" * 100_000, ["levels deep"]),
        ("a.json", b"[" + b"9" * 5000 + b"]", ["digits"]),
        ("a.json", b"[]", ["empty"]),
        ("a.csv", b"", ["empty"]),
        ("a.csv", b"prompt,completion\n", ["empty"]),
        ("a.csv", b"prompt,answer\na,b\n", ["line 2", '"completion"', "'prompt', 'answer'"]),
        ("a.csv", b"prompt,completion,prompt\na,b,c\n", ["line 1", "prompt", "2 times"]),
        ("a.csv", b'prompt,completion\n"a\n",b\nc\n', ["line 4", "2 fields", "got 1"]),
        ("a.csv", b"prompt,completion\na,b,c\n", ["line 2", "2 fields", "got 3"]),
        ("a.csv", b'prompt,completion\na,b\n"c,d\n', ["line 3", "not CSV"]),
        ("a.csv", "prompt,completion\na,b\né,d\n".encode("latin-1"), ["line 3", "UTF-8"]),
        ("a.csv", b"PK\x03\x04", ["zip"]),
        ("a.xlsx", b"PK\x03\x04", [".csv", ".parquet"]),
        ("a.parquet", LINE, ["damaged, or not Parquet"]),
        ("a.parquet", b"", ["damaged, or not Parquet"]),
        ("a.parquet", lambda: talks("parquet")[:-50], ["damaged, or not Parquet"]),
        ("a.parquet", parquet_of(("prompt", ["a", None]), ("completion", ["b", "c"])), ["row 2"]),
        ("a.parquet", parquet_of(("words", ["a"])), ["row 1", "'words'"]),
        ("a.parquet", parquet_of(("text", [b"\xff"])), ["row 1: text"]),
        ("a.parquet", parquet_of(("text", ["a"]), ("text", ["b"])), ["2 times"]),
        ("a.parquet", parquet_of(("text", [])), ["empty"]),
        ("a.arrow", b"", ["damaged, or not written by datasets"]),
        ("a.arrow", lambda: talks("stream")[:9999], ["damaged, or not written by datasets"]),
        ("a.arrow", lambda: talks("file"), ["damaged, or not written by datasets"]),
        ("a.arrow", arrow_outside, ["damaged, or not written by datasets", "offset"]),
    ],
)
def test_invalid_files_are_rejected(tmp_path: pathlib.Path, name: str, content: Content, parts: list[str]) -> None:
    sentence = refusal(tmp_path, name, content)
    for part in parts:
        assert part in sentence, sentence


def answered(**fields: Any) -> Any:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **fields}]}


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": "q"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "messages[0].role"),
        (answered(), "messages[1].content"),
        (answered(content=[{"type": "image", "url": "x"}]), "messages[1].content[0]"),
        (answered(content="b", weight=0), "messages[1].weight"),
        (answered(content="b", train=False), "messages[1].train"),
        (answered(tool_calls=[{"name": 5}]), "messages[1].tool_calls[0]"),
        (answered(tool_calls=[{"name": "f", "arguments": "{"}]), "messages[1].tool_calls[0].arguments"),
        (answered(tool_calls=[{"name": "f", "arguments": [1]}]), "messages[1].tool_calls[0].arguments"),
        (PREFERENCE | {"rejected": 5}, "rejected"),
        ({"chosen": "a", "rejected": "b"}, '"prompt"'),
        ({"prompt": "a", "rejected": "c"}, '"chosen" and "rejected"'),
        (TALK | {"tools": 5}, "tools"),
        (TALK | {"tools": "["}, "tools"),
        (LABELLED | {"label": "good"}, "label: expected true or false"),
        (LABELLED | {"label": 0.5}, "label: expected true or false"),
        (LABELLED | {"label": [True]}, "label: expected true or false"),
        (LABELLED | {"completion": [PAIR[1], PAIR[1]]}, "completion: expected one answer"),
        (LABELLED | {"messages": PAIR[:1]}, "label: expected a conversation that ends with an answer"),
        (LABELLED | {"messages": PAIR[1:]}, "label: expected a conversation that ends with an answer"),
        (LABELLED | {"messages": []}, "label: expected a conversation that ends with an answer"),
        (LABELLED | {"chosen": "b", "rejected": "c"}, "label: expected it beside a prompt"),
        ({"text": "b", "label": False}, "label: expected it beside a prompt"),
        ({"prompt": "a", "completion": "b", "images": ["a.png"]}, "images: not supported"),
    ],
    ids=str,
)
def test_invalid_rows_are_rejected(tmp_path: pathlib.Path, row: Any, part: str) -> None:
    sentence = refusal(tmp_path, "a.jsonl", LINE + jsonl(row))
    assert "line 2" in sentence
    assert part in sentence


def test_directories_of_save_to_disk(tmp_path: pathlib.Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    one = datasets.Dataset.from_list([{"id": i, "prompt": "a", "completion": "b"} for i in range(3)])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "several")
    assert list(read_examples(str(tmp_path / "one"))) == [PAIR] * 3
    assert list(read_examples(str(tmp_path / "several"), "test")) == [PAIR]
    with pytest.raises(UserError, match="no split dev; --split takes one of train, test"):
        read_examples(str(tmp_path / "several"), "dev")
    with pytest.raises(UserError, match="one was written by save_to_disk; name that directory alone"):
        read_examples(str(tmp_path))
    for damaged in (b"", arrow_outside()):
        (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(damaged)
        with pytest.raises(UserError, match=f"--data {tmp_path / 'one'}: damaged"):
            read_examples(str(tmp_path / "one"))


def test_parquet_without_pyarrow(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(tmp_path, "a.parquet", b"PAR1")


def test_a_directory(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.jsonl").write_bytes(LINE)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "README.md").write_text("of them")
    (tmp_path / ".hidden.jsonl").write_text("{")
    assert list(read_examples(str(tmp_path))) == ["some text", PAIR]
    assert "left out: README.md" in capfd.readouterr().out
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_bytes(LINE * 3)
    (tmp_path / "data" / "test.jsonl").write_bytes(LINE)
    assert list(read_examples(str(tmp_path))) == [PAIR] * 3
    assert "data/test.jsonl" in capfd.readouterr().out
    assert list(read_examples(str(tmp_path), "test")) == [PAIR]
    with pytest.raises(UserError, match="no split dev; --split takes one of test, train"):
        read_examples(str(tmp_path), "dev")
    (tmp_path / "data" / "test.jsonl").unlink()
    (tmp_path / "data" / "train-00000-of-00001.jsonl").unlink()
    (tmp_path / "data" / "b.jsonl").write_bytes(LINE + b"5")
    with pytest.raises(UserError, match=r"b.jsonl, line 2"):
        read_examples(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected files in it that end in \.jsonl"):
        read_examples(str(tmp_path / "empty"))
    assert directory._split_of(pathlib.PurePath("latest/protest.jsonl")) is None


def test_a_data_set_of_the_hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory stands for a dataset of the hub, because the library reads both in the same way."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    (tmp_path / "train.jsonl").write_bytes(LINE * 3)
    (tmp_path / "test.jsonl").write_bytes(LINE + b'{"prompt": "a", "completion": null}')
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: builder(str(tmp_path)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, **options: load(str(tmp_path), **options))
    assert list(read_examples("owner/name")) == [PAIR] * 3
    with pytest.raises(UserError, match="--data owner/name, test row 2"):
        read_examples("owner/name", "test")
    with pytest.raises(UserError, match="cannot read it from the hub"):
        read_examples("owner/name", "dev")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match="expected a dataset of arrow, csv, json, parquet, text files"):
        read_examples("owner/name")


def test_datasets_reports_no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("datasets.load.get_session", lambda: pytest.fail("it sends the name of the dataset"))
    hub._library("")
    datasets.load.increase_load_count("owner/name")


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such file or directory, and cannot read it from the hub"):
        read_examples("no-such-owner/no-such-name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install 'datasets"):
        read_examples("no-such-owner/no-such-name")
    for name in ("data/pairs.jsonl", "a/b/c", "../up", "name", "/owner/name"):
        assert not hub.is_name(name) or name.endswith("jsonl")
        with pytest.raises(UserError, match=r"no such file or directory$"):
            read_examples(name)


def test_large_data_are_not_stored_in_memory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr("qlora_app.data.store._IN_MEMORY", 1 << 20)
    rows = 20_000
    with (tmp_path / "a.jsonl").open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"text": f"{i} " + "x" * 1000}) + "\n")
    tracemalloc.start()
    examples = read_examples(str(tmp_path / "a.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert len(examples) == rows
    assert str(examples[rows - 1]).startswith(f"{rows - 1} ")
    assert [str(e).partition(" ")[0] for e in examples[:3]] == ["0", "1", "2"]


def test_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: Stored[str] = Stored()

    class Full:
        def seek(self, at: int) -> None: ...

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "_file", Full())
    with pytest.raises(UserError, match="TMPDIR"):
        stored.append("a")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("blanks", [b"\n", b" \n", b" " * 1000 + b"\n"])
def test_a_bomb_of_blank_lines_is_refused_early(tmp_path: pathlib.Path, name: str, blanks: bytes) -> None:
    content = blanks * ((4 << 20) // len(blanks)) + LINE
    content = gzip.compress(content) if name.endswith(".gz") else content
    assert "bytes of blank lines before this line" in refusal(tmp_path, name, content)


def test_blanks_within_json_take_no_time(tmp_path: pathlib.Path) -> None:
    """One search skips all blank lines, because a compressed file may contain hundreds of megabytes of them."""
    begun = time.process_time()
    content = b"[" + b" " * (20 << 20) + LINE.strip() + b"\t" * (20 << 20) + b"]"
    assert read(tmp_path, "a.json", content) == [PAIR]
    assert time.process_time() - begun < 3  # 10 s with one step per line
