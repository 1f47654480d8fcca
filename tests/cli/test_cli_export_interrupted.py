"""Exports that are killed, or for which the disk is too small: nothing incomplete stays under the final name."""

from __future__ import annotations

import functools
import os
import pathlib
import resource
import shutil
import signal
import sys
import types
from typing import Any

import pytest

from commands import command, here, listing
from exports import adapt, output_of, read, write_base
from qlora_app.errors import UserError, writing

# One target of each kind of writer, and the library that it needs.
TARGETS = {
    **{"dense": "transformers", "bitsandbytes": "bitsandbytes", "compressed-tensors:nvfp4": "compressed_tensors"},
    **dict.fromkeys(("gguf-adapter", "gguf:q4_0", "ollama:iq4_nl", "ollama:adapter"), "gguf"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An adapter whose base is a GGUF file that stores no 4-bit weights, so that every target can hold it."""
    base = write_base(tmp_path_factory.mktemp("interrupted") / "base.gguf", "F16")
    adapt(base.parent / "adapter", base, read(base), r=8)
    return base.parent / "adapter"


def command_line(adapter: pathlib.Path, target: str, directory: pathlib.Path) -> tuple[list[Any], pathlib.Path]:
    pytest.importorskip(TARGETS[target], reason=f"{TARGETS[target]} is not installed")
    output = output_of(target, directory)
    return ["export", "--adapter", adapter, "--check", "none", "--to", target, "--output", output], output


def kill_at(moment: str, number: int, folder: str) -> None:
    """Kills this process when it opens a file below ``folder`` for writing, or renames one, for the n-th time."""
    left = number

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event != moment or not str(arguments[0]).startswith(f"{folder}/.partial-new"):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)


def state(path: pathlib.Path) -> Any:
    return listing(path) if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("target", TARGETS)
def test_a_killed_export_leaves_nothing_half(adapter: pathlib.Path, tmp_path: pathlib.Path, target: str) -> None:
    export, output = command_line(adapter, target, tmp_path)
    for moment, number in (("open", 2), ("os.rename", 1)):  # the first call creates the file
        done = command(*export, before=functools.partial(kill_at, moment, number, str(tmp_path)))
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        assert not output.exists()
        left = [path.name for path in tmp_path.iterdir()]
        assert any(name.startswith(".partial-new-") for name in left), (moment, left)
    here(*export)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    complete = state(output)
    done = command(*export, "--overwrite", before=functools.partial(kill_at, "os.rename", 1, str(tmp_path)))
    assert done.returncode == -signal.SIGKILL
    assert not output.suffix or state(output) == complete  # a directory may have another name until the next export
    here(*export, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert state(output) == complete


def limit_files(size: int) -> None:
    """Files of this process cannot become larger than ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_that_cannot_be_written(adapter: pathlib.Path, tmp_path: pathlib.Path, target: str) -> None:
    export, output = command_line(adapter, target, tmp_path)
    done = command(*export, before=functools.partial(limit_files, 4096))
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith("qlora-ext: base.gguf: ")]
    assert len(told) == 1, done.stderr
    assert str(output) in told[0]
    assert "unexpected" not in told[0]
    assert [*tmp_path.iterdir()] == []


def test_numpys_error_for_a_full_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ndarray.tofile``, with which the gguf package writes, raises an OSError without an errno."""
    for free, message in (
        (0, "the disk .* is full; no incomplete file was left"),
        (1 << 30, "cannot write .*: 96 requested"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        with pytest.raises(UserError, match=message), writing(tmp_path / "out.gguf"):
            raise OSError("96 requested and 64 written")
