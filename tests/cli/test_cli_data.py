"""``--data``: every kind of file is read in bounded memory, or rejected with the line and what was expected."""

from __future__ import annotations

import gzip
import json
import pathlib
import sys
import time
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from qlora_app.data import directory, hub, read_examples
from qlora_app.data.store import Stored
from qlora_app.errors import UserError

PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LINE = b'{"prompt": "a", "completion": "b"}\n'
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def read(directory: pathlib.Path, name: str, content: bytes | str, **options: str) -> list[Any]:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_examples(str(path), **options))


def refusal(directory: pathlib.Path, name: str, content: bytes | str, **options: str) -> str:
    """The error for data that are rejected."""
    with pytest.raises(UserError) as refusal:
        read(directory, name, content, **options)
    assert str(directory / name) in str(refusal.value)
    return str(refusal.value)


def test_characters_that_end_a_line_elsewhere_are_part_of_a_text(tmp_path: pathlib.Path) -> None:
    written = "a\u2028b\u2029c\x85d"  # as they are
    raw = "e\x0bf\x0cg\x1ch\x1di\x1ej"  # JSON files may contain them unescaped
    content = json.dumps({"text": written}, ensure_ascii=False) + "\n" + f'{{"text": "{raw}"}}\n'
    assert read(tmp_path, "a.jsonl", content) == [written, raw]
    assert read(tmp_path, "a.json", "[" + content.strip().replace("\n", ",\n") + "]") == [written, raw]
    assert read(tmp_path, "a.csv", f'text\n"{written}"\n"{raw}"\n') == [written, raw]


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


def test_csv_fields_may_contain_any_characters(tmp_path: pathlib.Path) -> None:
    content = 'id,prompt,completion\r\n1,"say ""hi"", twice","b\r\nc\rd"\r\n2,,' + "x" * 200_000 + "\r\n"
    first, second = read(tmp_path, "a.csv", content)
    assert [m["content"] for m in first] == ['say "hi", twice', "b\r\nc\rd"]
    assert [m["content"] for m in second] == ["", "x" * 200_000]
    assert read(tmp_path, "old.csv", b"prompt,completion\ra,b\ra,b\r") == [PAIR, PAIR]
    (talk,) = read(tmp_path, "talk.csv", 'messages\n"' + json.dumps(TALK["messages"]).replace('"', '""') + '"\n')
    assert talk == TALK


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
        ("a.json", b'[\n{"text": "a"},\n{"words": "b"}\n]', ["line 3", "'words'"]),
        ("a.json", b'[\n{"text": "a"},\n{"text": "b"', ["line 3", "not JSON"]),
        ("a.json", b'{"test": [], "dev": []}', ["line 1", "train", "test, dev"]),
        ("a.json", b'{"test": [\n{"text": "a"},\n 5]}', ["line 3", "got 5"]),
        ("a.json", b'[{"text": "a"}] [', ["end of the file"]),
        ("a.json", b"5", ["array"]),
        ("a.json", b"[" * 100_000, ["levels deep"]),
        ("a.json", b"[" + b"9" * 5000 + b"]", ["digits"]),
        ("a.json", b"[]", ["empty"]),
        ("a.csv", b"", ["empty"]),
        ("a.csv", b"prompt,completion\n", ["empty"]),
        ("a.csv", b"prompt,answer\na,b\n", ["line 1", '"completion"', "prompt, answer"]),
        ("a.csv", b"prompt,completion,prompt\na,b,c\n", ["line 1", "prompt", "2 times"]),
        ("a.csv", b'prompt,completion\n"a\n",b\nc\n', ["line 4", "2 fields", "got 1"]),
        ("a.csv", b"prompt,completion\na,b,c\n", ["line 2", "2 fields", "got 3"]),
        ("a.csv", b'prompt,completion\na,b\n"c,d\n', ["line 3", "not CSV"]),
        ("a.csv", "prompt,completion\na,b\né,d\n".encode("latin-1"), ["line 3", "UTF-8"]),
        ("a.xlsx", b"PK\x03\x04", [".csv", ".parquet"]),
        ("a.csv", b"PK\x03\x04", ["zip"]),
        ("a.parquet", LINE, ["Parquet"]),
        ("a.parquet", b"", ["Parquet"]),
    ],
)
def test_invalid_data_are_rejected(tmp_path: pathlib.Path, name: str, content: bytes, parts: list[str]) -> None:
    sentence = refusal(tmp_path, name, content)
    assert "\n" not in sentence
    assert len(sentence) < 600
    for part in parts:
        assert part in sentence, sentence


def message(**fields: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **fields}]})


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ('{"messages": "q"}', "messages"),
        ('{"messages": [5]}', "messages[0]"),
        ('{"messages": [{"role": "asistant", "content": "a"}]}', "messages[0].role"),
        (message(), "messages[1].content"),
        (message(content=[{"type": "image", "url": "x"}]), "messages[1].content[0]"),
        (message(tool_calls=[{"name": 5}]), "messages[1].tool_calls[0]"),
        (message(tool_calls=[{"name": "f", "arguments": "{"}]), "messages[1].tool_calls[0].arguments"),
        (message(tool_calls=[{"name": "f", "arguments": [1]}]), "messages[1].tool_calls[0].arguments"),
        ('{"prompt": "q", "chosen": "a", "rejected": 5}', "rejected"),
        ('{"chosen": "a", "rejected": "b"}', '"prompt"'),
        (json.dumps(TALK | {"tools": 5}), "tools"),
        (json.dumps(TALK | {"tools": "["}), "tools"),
    ],
)
def test_messages_that_are_refused(tmp_path: pathlib.Path, row: str, part: str) -> None:
    sentence = refusal(tmp_path, "a.jsonl", LINE + row.encode())
    assert "line 2" in sentence
    assert part in sentence


def test_conversations(tmp_path: pathlib.Path) -> None:
    """The published layouts give the same rows."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "two", "reasoning_content": "easy"},
    ]
    openai = json.loads(json.dumps(said))
    openai[2] |= {"content": None, "tool_calls": [{**call, "function": {"name": "add", "arguments": '{"a": 1}'}}]}
    openai[1]["content"] = [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1"}]
    rows = [
        {"messages": said, "tools": TOOLS},
        {"messages": openai, "tools": json.dumps(TOOLS)},
        {"messages": said[1:], "system": "be brief", "tools": TOOLS},
        {"prompt": said[:-1], "completion": said[-1:], "tools": TOOLS},
    ]
    found = read(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert found == [{"messages": said, "tools": TOOLS}] * 4
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}
    assert read(tmp_path, "b.jsonl", json.dumps(shared)) == [TALK]


def test_preferences(tmp_path: pathlib.Path) -> None:
    asked, yes, no = (
        {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
    )
    rows = [
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"prompt": [asked], "chosen": [yes], "rejected": [no]},
        {"chosen": [asked, yes], "rejected": [asked, no]},
        {"prompt": "q", "chosen": [asked, yes], "rejected": [asked, no]},
        {"question": "q", "chosen": "y", "rejected": "n"},
    ]
    found = read(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert found == [{"prompt": [asked], "chosen": [yes], "rejected": [no]}] * 5
    mixed = json.dumps(rows[0]) + "\n" + LINE.decode()
    assert "line 2: expected a preference" in refusal(tmp_path, "b.jsonl", mixed)
    assert "line 2: expected no preference" in refusal(tmp_path, "c.jsonl", LINE.decode() + json.dumps(rows[0]))


def test_labels(tmp_path: pathlib.Path) -> None:
    good = {"prompt": [PAIR[0]], "completion": [PAIR[1]], "label": True}
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": [PAIR[0]], "completion": [PAIR[1]], "label": 1},
        {"question": "a", "answer": "b", "label": "True"},
        {"messages": PAIR, "label": True},
    ]
    assert read(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == [good] * 4
    bad = good | {"label": False}
    assert read(tmp_path, "a.csv", "prompt,completion,label\na,b,false\na,b,0\n") == [bad] * 2
    labelled = json.dumps(rows[0]) + "\n"
    unlabelled = json.dumps({**rows[0], "label": None})
    assert "line 2: expected an answer with a label" in refusal(tmp_path, "b.jsonl", labelled + unlabelled)
    assert "got an answer with a label" in refusal(tmp_path, "c.jsonl", LINE.decode() + labelled)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"label": "good"}, "label: expected true or false"),
        ({"label": 0.5}, "label: expected true or false"),
        ({"label": [True]}, "label: expected true or false"),
        ({"label": True, "completion": [PAIR[1], PAIR[1]]}, "completion: expected one answer"),
        ({"label": True, "messages": PAIR[:1]}, "label: expected a conversation that ends with an answer"),
        ({"label": True, "messages": PAIR[1:]}, "label: expected a conversation that ends with an answer"),
        ({"label": True, "messages": []}, "label: expected a conversation that ends with an answer"),
        ({"label": True, "chosen": "b", "rejected": "c"}, "label: expected it beside a prompt"),
        ({"label": False, "text": "b"}, "label: expected it beside a prompt"),
        ({"rejected": "c"}, '"chosen" and "rejected"'),
        ({"images": ["a.png"]}, "images: not supported"),
        ({"messages": [PAIR[0], PAIR[1] | {"weight": 0}]}, "messages[1].weight"),
        ({"messages": [PAIR[0], PAIR[1] | {"train": False}]}, "messages[1].train"),
    ],
)
def test_columns_that_change_the_meaning_of_others_are_refused(
    tmp_path: pathlib.Path, more: dict[str, Any], part: str
) -> None:
    row = {"prompt": "a", "completion": "b", **more}
    assert part in refusal(tmp_path, "a.jsonl", json.dumps(row))


def test_columns_that_may_be_ignored(tmp_path: pathlib.Path) -> None:
    rows = [{"text": "a", "label": 3}, {"text": "a", "label": "spam", "images": []}, {"messages": PAIR, "weight": 2}]
    asked = {**PAIR[0], "train": False}
    rows.append({"messages": [asked, {**PAIR[1], "weight": 1, "train": True}]})
    assert read(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == [
        "a", "a", {"messages": PAIR}, {"messages": PAIR},
    ]  # fmt: skip


def test_parquet(tmp_path: pathlib.Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    def write(name: str, table: Any) -> pathlib.Path:
        parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    rows = [TALK, {"messages": [*TALK["messages"], {"role": "tool", "content": "5", "name": "add"}]}] * 400
    talk = write("talk.parquet", pyarrow.Table.from_pylist(rows).append_column("id", [list(range(800))]))
    assert list(read_examples(str(talk))) == rows
    for name, table, part in (
        ("null.parquet", pyarrow.table({"prompt": ["a", None], "completion": ["b", "c"]}), "row 2"),
        ("columns.parquet", pyarrow.table({"words": ["a"]}), "words"),
        ("bytes.parquet", pyarrow.table({"text": pyarrow.array([b"\xff"], pyarrow.binary())}), "row 1: text"),
        ("twice.parquet", pyarrow.table([["a"], ["b"]], names=["text", "text"]), "2 times"),
        ("empty.parquet", pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "empty"),
    ):
        with pytest.raises(UserError, match=part):
            read_examples(str(write(name, table)))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(talk.read_bytes()[:-50])
    with pytest.raises(UserError, match="Parquet"):
        read_examples(str(cut))


def test_arrow(tmp_path: pathlib.Path) -> None:
    """Arrow files, and streams, which datasets writes to .arrow files."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pyarrow.Table.from_pylist([{"id": i, **TALK} for i in range(600)])
    for name, writer in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with writer(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
        assert list(read_examples(str(tmp_path / name))) == [TALK] * 600
        content = (tmp_path / name).read_bytes()
        assert "damaged, or not Arrow" in refusal(tmp_path, "cut.arrow", content[: len(content) // 2])
    assert "damaged, or not Arrow" in refusal(tmp_path, "none.arrow", b"")


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
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"")
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


def test_dictionary_terms_may_contain_any_characters(tmp_path: pathlib.Path) -> None:
    body = "a\x85b\n its definition\n".encode()
    (tmp_path / "d.index").write_text("a\x85b\tA\tV\n", encoding="utf-8")
    (pair,) = read(tmp_path, "d.dict.dz", gzip.compress(body))
    assert [m["content"] for m in pair] == ["a\x85b", "its definition"]


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
