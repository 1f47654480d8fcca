"""Faults below a streamed model have clear errors: of its files, of the disk, of the process that reads."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qlora_ext.streaming import stream
from qlora_ext.untrusted import FileError
from streamed_models import adapted, load, trained
from tiny_models import token_ids


@pytest.fixture
def own(llama: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    copied = tmp_path / "own"
    copied.mkdir()
    for file in llama.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def test_a_file_that_is_cut_short_is_a_clear_error(own: pathlib.Path) -> None:
    model = adapted(stream(load(own), source="disk"))
    trained(model, steps=1)
    file = sorted(own.glob("*.safetensors"))[-1]
    complete = file.read_bytes()
    os.truncate(file, 100)
    with pytest.raises(FileError, match=f"{file.name}: truncated while in use: 100 of {len(complete)} bytes"):
        trained(model, steps=1)
    with pytest.raises(FileError, match="truncated"):
        model.state_dict()
    expected = trained(adapted(load_from(complete, file)), steps=1)
    assert_losses_again(own, expected)


def load_from(complete: bytes, file: pathlib.Path) -> Any:
    file.write_bytes(complete)
    return load(file.parent)


def assert_losses_again(path: pathlib.Path, expected: Any) -> None:
    assert trained(adapted(stream(load(path), source="disk")), steps=1)[0] == expected[0]


def test_a_file_that_changes_is_a_clear_error(own: pathlib.Path) -> None:
    model = stream(load(own), source="disk")
    file = sorted(own.glob("*.safetensors"))[-1]
    with file.open("r+b") as opened:
        opened.seek(-10, os.SEEK_END)
        opened.write(b"changed")
    with pytest.raises(FileError, match=f"{file.name}: changed while in use"):
        model(token_ids())


def test_a_file_that_is_replaced_is_read_on(own: pathlib.Path) -> None:
    model, expected = stream(load(own), source="disk"), load(own)(token_ids()).logits
    for file in own.glob("*.safetensors"):
        (own / "other").write_bytes(b"\0" * file.stat().st_size)
        (own / "other").replace(file)
    assert torch.equal(model(token_ids()).logits, expected)


def test_a_read_error_is_a_clear_error_and_the_next_pass_reads_again(
    llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = stream(load(llama), source="disk"), load(llama)(token_ids()).logits
    preadv = os.preadv

    def broken(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(FileError, match=r"cannot read .*safetensors at byte \d+: Input/output error"):
        model(token_ids())
    monkeypatch.setattr(os, "preadv", preadv)
    assert torch.equal(model(token_ids()).logits, expected)


def test_a_short_read_is_continued(llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, preadv = load(llama)(token_ids()).logits, os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:100]], at))
    assert torch.equal(stream(load(llama), source="disk")(token_ids()).logits, expected)
