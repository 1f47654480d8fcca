"""Reads untrusted JSON, and makes untrusted text printable."""

from __future__ import annotations

import json
import pathlib

import pytest

from qlora_ext.untrusted import FileError, excerpt, parse_json, printable, read_json

SCHEMA = {"name": str, "rank?": int, "loss?": float, "turns?": [{"role": str}], "more?": {"on": bool}}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "a"}',
        '{"name": "a", "rank": null, "loss": 3, "turns": [], "more": {"on": true}, "unknown": [1, {}]}',
        '{"name": "a", "rank": -7, "loss": 1e300, "turns": [{"role": "x"}, {"role": "y", "z": 0}]}',
    ],
)
def test_valid_values_are_returned_unchanged(text: str) -> None:
    assert parse_json(text, "it", SCHEMA) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"name": ', "not JSON"),
        ("[" * 100_000, "levels deep"),
        ("[" * 200 + "]" * 200, "levels deep"),
        ('{"name": {"a": ' * 50 + "1" + "}}" * 50, "levels deep"),
        ("[]", "an object"),
        ("null", "an object"),
        ("{}", "expected name in it"),
        ('{"name": null}', "name to be a text"),
        ('{"name": 5}', "name to be a text"),
        ('{"name": "a", "rank": "5"}', "rank to be an integer"),
        ('{"name": "a", "rank": true}', "rank to be an integer"),
        ('{"name": "a", "rank": 5.5}', "rank to be an integer"),
        ('{"name": "a", "rank": 1' + "0" * 400 + "}", "digits"),
        ('{"name": "a", "rank": 9223372036854775808}', "rank to be an integer"),
        ('{"name": "a", "x": {"y": ["\\ud800"]}}', "surrogate"),
        ('{"name": "a", "\\udfff": 1}', "surrogate"),
        ('{"name": "a", "loss": []}', "loss to be a number"),
        ('{"name": "a", "turns": {}}', "turns to be a list"),
        ('{"name": "a", "turns": [{"role": "x"}, 3]}', r"turns\[1\] to be an object"),
        ('{"name": "a", "turns": [{"role": 3}]}', r"turns\[0\].role to be a text"),
        ('{"name": "a", "more": {"on": 1}}', "more.on to be true or false"),
    ],
)
def test_invalid_values_are_named(text: str, message: str) -> None:
    with pytest.raises(FileError, match=message) as caught:
        parse_json(text, "the file", SCHEMA)
    assert str(caught.value).startswith("the file: ")
    assert len(str(caught.value)) < 200


def test_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff{}")
    (tmp_path / "good").write_text('{"name": "é"}', encoding="utf-8")
    for name in ("binary", "absent", "."):
        with pytest.raises(FileError, match=str(tmp_path)):
            read_json(tmp_path / name)
    assert read_json(tmp_path / "good", SCHEMA) == {"name": "é"}


def test_nothing_that_a_terminal_acts_on_is_left() -> None:
    raw = "a\x1b[2J\x07\x9b31m\x00\r\n\tb\u202eé ß \U0001f469\u200d\U0001f680\ud800"
    shown = printable(raw)
    assert shown == r"a\x1b[2J\x07\x9b31m\x00\r\n\tb\u202e" + "é ß \U0001f469\u200d\U0001f680" + r"\ud800"
    assert printable(raw, lines=True) == shown.replace(r"\n\t", "\n\t")
    assert printable("plain text, 漢字") == "plain text, 漢字"


def test_an_excerpt_is_short() -> None:
    assert excerpt("x" * 81) == "x" * 77 + "..."
    assert len(excerpt({"a": "\x1b" * 500})) == 80
    assert excerpt(5) == "5"
