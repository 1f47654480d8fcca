"""Files and directories are complete or absent: kills before every step, modes, planted links, mounts."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from qlora_app.errors import UserError
from qlora_app.outputs import files
from qlora_app.outputs.ownership import foreign_to
from qlora_ext import atomic

# Python's audit events for changes of a directory.
_STEPS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "open"}


def fill(directory: pathlib.Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    (directory / "weights").write_text(content * 1000)
    (directory / "deep").mkdir()
    (directory / "deep" / "file").write_text(content)


def complete_content(directory: pathlib.Path) -> str:
    """The content that ``fill`` gave the directory, which must contain nothing else."""
    content = (directory / "config.json").read_text()
    assert (directory / "weights").read_text() == content * 1000
    assert (directory / "deep" / "file").read_text() == content
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "deep", "weights"]
    return content


FILLED = foreign_to({"config.json", "weights", "deep/file"})


def replace(path: pathlib.Path) -> None:
    with files.staged_directory(path, FILLED) as partial:
        fill(partial, "new")


def killed_at(step: int, action: Callable[[], None], interrupt: bool = False) -> bool:
    """Runs ``action`` in a fork that is killed before its step-th change. Returns whether it was killed.

    With ``interrupt`` it gets Ctrl-C there instead, and cleans up.
    """
    child = os.fork()
    if child == 0:
        left = step

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in _STEPS:
                left -= 1
                if left == -1 and interrupt:
                    raise KeyboardInterrupt
                if left < 0 and not interrupt:
                    os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            sys.addaudithook(hook)
            action()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert interrupt or os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return status != 0


@pytest.fixture(params=["beside", "inside", "fallback"])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A directory that can be renamed, one that is known not to be, and one for which renaming fails when tried."""
    path = tmp_path / "out"
    if request.param == "inside":
        monkeypatch.setattr(files, "filled_from_inside", lambda directory: directory == path)
    if request.param == "fallback":
        refuse_to_rename(path, errno.EBUSY, monkeypatch)
    return path


def refuse_to_rename(path: pathlib.Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: os.PathLike[str], target: os.PathLike[str], **options: object) -> None:
            if path in (pathlib.Path(source), pathlib.Path(target)):
                raise OSError(error, os.strerror(error), str(source))
            rename(source, target, **options)

        return renamed

    monkeypatch.setattr(os, "rename", refusing(os.rename))
    monkeypatch.setattr(os, "replace", refusing(os.replace))


def test_killed_at_every_step_the_old_or_the_new_is_complete(place: pathlib.Path) -> None:
    seen = set()
    step = 0
    while True:
        place.mkdir()
        fill(place, "old")
        killed = killed_at(step, lambda: replace(place))
        messages = files.recover(place)
        seen.add(complete_content(place))
        assert [path.name for path in place.parent.iterdir()] == ["out"]
        assert files.recover(place) == []
        if not killed:
            break
        assert all(str(place.parent) in sentence for sentence in messages)
        subprocess.run(["rm", "-r", place], check=True)
        step += 1
    assert step > 10
    assert seen == {"old", "new"}
    assert complete_content(place) == "new"


def test_ctrl_c_at_every_step_leaves_the_old_or_the_new(place: pathlib.Path) -> None:
    """Its own name is restored without recovery, which is needed only if Ctrl-C interrupts the cleaning up itself."""
    place.mkdir()
    fill(place, "old")
    for step in range(200):
        interrupted = killed_at(step, lambda: replace(place), interrupt=True)
        assert content_without_unfinished(place) in ("old", "new"), step
        files.recover(place)
        assert [path.name for path in place.parent.iterdir()] == ["out"]
        if not interrupted:
            break
    assert step > 10
    assert complete_content(place) == "new"


def content_without_unfinished(directory: pathlib.Path) -> str:
    assert [path.name for path in files.contents(directory)] == ["config.json", "deep", "weights"]
    return (directory / "config.json").read_text()


@pytest.mark.slow
def test_killed_while_it_recovers(place: pathlib.Path) -> None:
    """Two kills, the second during the recovery from the first, lose no data."""
    first = 0
    while True:
        second = 0
        while True:
            place.mkdir()
            fill(place, "old")
            ended = not killed_at(first, lambda: replace(place))
            killed = killed_at(second, lambda: files.recover(place) and None)
            files.recover(place)
            assert complete_content(place) in ("old", "new")
            assert [path.name for path in place.parent.iterdir()] == ["out"]
            subprocess.run(["rm", "-r", place], check=True)
            if not killed:
                break
            second += 1
        if ended:
            break
        first += 5
    assert first > 10


def test_a_directory_set_aside_comes_back_on_an_error(place: pathlib.Path) -> None:
    place.mkdir()
    fill(place, "old")

    def failing() -> None:
        with files.staged_directory(place, FILLED) as partial:
            fill(partial, "new")
            (partial / "deep").symlink_to("nowhere")

    with pytest.raises(UserError, match="cannot write"):
        failing()
    assert complete_content(place) == "old"
    assert [path.name for path in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM])
def test_a_directory_that_cannot_be_renamed_is_filled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    path = tmp_path / "out"
    refuse_to_rename(path, error, monkeypatch)
    path.mkdir()
    for _ in range(2):
        replace(path)
        assert complete_content(path) == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_another_error_of_renaming_loses_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    fill(path, "old")
    refuse_to_rename(path, errno.EIO, monkeypatch)
    with pytest.raises(UserError, match="cannot write"):
        replace(path)
    assert complete_content(path) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    former = os.umask(mask)
    try:
        yield
    finally:
        os.umask(former)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_modes_follow_the_umask(tmp_path: pathlib.Path, mask: int) -> None:
    with umask(mask):
        replace(tmp_path / "out")
        files.write_json(tmp_path / "file.json", {})
        files.append_json_line(tmp_path / "lines.jsonl", {})
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_private_directory_stays_private(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    replace(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_a_planted_link_is_not_followed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes the next temporary name, which an attacker might predict."""
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "0" * 2 * size)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("kept")
    for name in ("out", "file.json"):
        (tmp_path / f".partial-new-{name}-00000000").symlink_to(victim)
    with pytest.raises(UserError, match="exists"):
        replace(tmp_path / "out")
    for name in ("out", "file.json"):
        (tmp_path / f".partial-new-{name}-00000000").unlink(missing_ok=True)
    (tmp_path / ".partial-new-file.json-00000000").symlink_to(victim / "precious")
    with pytest.raises(UserError, match="exists"):
        files.write_json(tmp_path / "file.json", {})
    (tmp_path / ".partial-old-out-00000001").symlink_to(victim)
    (tmp_path / ".partial-gone-out-00000002").symlink_to(victim)
    (tmp_path / "out").mkdir()
    files.recover(tmp_path / "out")
    (tmp_path / "lines.jsonl").symlink_to(victim / "precious")
    with pytest.raises(UserError):
        files.append_json_line(tmp_path / "lines.jsonl", {})
    assert [path.name for path in victim.iterdir()] == ["precious"]
    assert (victim / "precious").read_text() == "kept"


def test_killed_while_it_removes_the_kept_results(tmp_path: pathlib.Path) -> None:
    """Weights and calibrations kept next to an output are complete or removed, and leave no other name."""
    output, waiting = tmp_path / "out", tmp_path / "out.weights"
    seen = set()
    for step in range(100):
        waiting.mkdir()
        fill(waiting, "done")
        killed = killed_at(step, lambda: files.delete(waiting, output, FILLED))
        files.recover(output)
        left = [path.name for path in tmp_path.iterdir()]
        assert left in ([], [waiting.name]), step
        seen.add(complete_content(waiting) if left else None)
        subprocess.run(["rm", "-rf", waiting], check=True)
        if not killed:
            break
    assert step > 3
    assert seen == {"done", None}


def test_recovery_touches_no_other_name(tmp_path: pathlib.Path) -> None:
    remaining = [
        ".partial-new-out-1-12345678",
        ".partial-new-out-1234567",
        ".partial-new-other-12345678",
        ".partial-mine",
        "out.bak",
    ]
    for name in remaining:
        (tmp_path / name).mkdir()
    (tmp_path / ".partial-new-out-12345678").mkdir()
    assert len(files.recover(tmp_path / "out")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(remaining)
    # The same for foreign names inside.
    assert files.recover(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(remaining)


def test_foreign_content_is_restored(place: pathlib.Path) -> None:
    """Foreign content added while the successor was written: a file, an empty directory, a link, unfinished work."""
    for name, make in {
        "thesis.tex": pathlib.Path.touch,
        "deep/notes": pathlib.Path.touch,
        "empty": pathlib.Path.mkdir,
        "link": lambda path: path.symlink_to("config.json"),
        ".partial-new-other-12345678": pathlib.Path.mkdir,
        ".partial-lock-other": pathlib.Path.touch,
    }.items():
        place.mkdir()
        fill(place, "old")

        def replace_meanwhile(name: str = name, make: Callable[[pathlib.Path], object] = make) -> None:
            with files.staged_directory(place, FILLED) as partial:
                fill(partial, "new")
                make(place / name)

        with pytest.raises(UserError, match="which qlora-ext did not write"):
            replace_meanwhile()
        with pytest.raises(UserError, match="which qlora-ext did not write"):
            files.delete(place, place.parent / "other", FILLED)
        assert os.path.lexists(place / name)
        assert (place / "config.json").read_text() == "old"
        assert [path.name for path in place.parent.iterdir()] == ["out"]
        subprocess.run(["rm", "-r", place], check=True)


def test_the_old_directory_is_not_lost_if_its_name_is_taken(tmp_path: pathlib.Path) -> None:
    """A kill between the two renamings, after which another process takes the name."""
    path = tmp_path / "out"
    for directory in (".partial-old-out-12345678", ".partial-new-out-12345678", "out"):
        (tmp_path / directory).mkdir()
        fill(tmp_path / directory, directory)
    [message, _] = files.recover(path)
    assert "out.former-1" in message
    assert complete_content(path) == "out"
    assert complete_content(tmp_path / "out.former-1") == ".partial-old-out-12345678"
    assert len(list(tmp_path.iterdir())) == 2
