"""The user's cache of compiled code: complete packages, and what killed compilations leave."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import zipfile

import pytest

import qlora_ext
import tiny_models
from qlora_app.decoding import cache
from qlora_app.errors import UserError
from qlora_app.generation.compiled import decode_compiled


def damage(package: pathlib.Path, kind: str) -> None:
    full = package.read_bytes()
    if kind == "a bit":
        at = len(full) // 2
        package.write_bytes(full[:at] + bytes([full[at] ^ 1]) + full[at + 1 :])
    else:
        package.write_bytes({"empty": b"", "truncated": full[: len(full) // 2], "noise": b"PK" * 5000}[kind])


@pytest.mark.parametrize("kind", ["empty", "truncated", "noise", "a bit"])
def test_a_damaged_package_is_no_package(tmp_path: pathlib.Path, kind: str) -> None:
    package = tmp_path / f"{'c' * 64}.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("code", bytes(range(256)) * 40)
    assert cache.is_complete(package)
    damage(package, kind)
    assert not cache.is_complete(package)


def test_special_files_are_not_packages(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("fifo", "link", "missing", "."):
        assert not cache.is_complete(tmp_path / name)


def test_only_files_of_killed_compilations_are_deleted(tmp_path: pathlib.Path) -> None:
    package = f"{'a' * 64}.pt2"
    for name in ("compiling-ab3_d6gh", "tmpab3_d6gh", "compiling-theses00", "tmp-directory", "compiling-running0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / package).write_text("half")
    (tmp_path / "compiling-empty000").mkdir()
    (tmp_path / "compiling-theses00" / "thesis.tex").write_text("mine")
    (tmp_path / "tmpalink000").symlink_to(tmp_path / "tmp-directory")
    (tmp_path / "tmpafile000").write_text("mine")
    (tmp_path / package).write_text("whole")
    descriptor = os.open(tmp_path / "compiling-running0", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    cache.clean(tmp_path)
    os.close(descriptor)
    left = ["compiling-running0", "compiling-theses00", "tmp-directory", "tmpafile000", "tmpalink000", package]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)
    assert (tmp_path / "tmp-directory" / package).exists()


def test_a_package_takes_its_name_when_it_is_written(tmp_path: pathlib.Path) -> None:
    package = tmp_path / f"{'b' * 64}.pt2"
    with contextlib.suppress(KeyboardInterrupt), cache.written(package) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with cache.written(package) as path:
        path.write_text("whole")
        cache.clean(tmp_path)  # held by another process, which is compiling
        assert path.exists()
    assert [p.name for p in tmp_path.iterdir()] == [package.name]
    assert package.read_text() == "whole"


def test_a_directory_that_others_can_write_to_is_not_used(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache.directory()
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)
    with pytest.raises(UserError, match="others can write to this directory"):
        decode_compiled(qlora_ext.quantize_model(tiny_models.make("llama")), "always", worthwhile=True)
