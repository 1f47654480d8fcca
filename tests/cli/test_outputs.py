"""Outputs are complete or absent, whatever happens to the processes that write them, and nothing foreign is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from commands import listing
from qlora_app.errors import UserError
from qlora_app.outputs import directory, files, lock, waiting
from qlora_app.outputs.directory import claim
from qlora_app.outputs.lock import locked
from qlora_app.outputs.output_file import claim_file
from qlora_app.outputs.ownership import MARKER, foreign_in
from qlora_ext import atomic

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "open"}  # Python's audit events
# A directory that can be renamed, one that is known not to be, and one for which renaming fails when tried.
PLACES = ("beside", "inside", errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)
# Directories of intermediate results, and how long the names of files in them are.
RESULTS = {"a.weights": 32, "a.calibration": 16, "b.weights": 32, "b.calibration": 16}
FOREIGN: dict[str, Callable[[pathlib.Path], object]] = {
    "thesis.tex": lambda path: path.write_text("mine"),
    "deep/notes": lambda path: path.write_text("mine"),
    "empty": pathlib.Path.mkdir,
    "link": lambda path: path.symlink_to("config.json"),
    "pipe": os.mkfifo,
    ".partial-new-other-12345678": pathlib.Path.mkdir,
    ".partial-lock-other": pathlib.Path.touch,
}

COMMANDS = {
    "name": st.sampled_from(["a", "a", "b", "c.gguf"]),
    "overwrite": st.sampled_from([True, True, False]),
    "results": st.sampled_from(["", "", "weights", "calibration"]),
}


def fill(directory: pathlib.Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    (directory / "weights").write_text(content * 1000)
    (directory / "deep").mkdir()
    (directory / "deep" / "file").write_text(content)


def content_of(directory: pathlib.Path, foreign: set[pathlib.Path] = frozenset()) -> str | None:
    """The content that ``fill`` gave the directory, which must be complete and, but for foreign entries, alone."""
    found = {path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()} - foreign
    names = {path.relative_to(directory).as_posix() for path in found} - {MARKER, files.LOCK}
    if not names:
        return None
    assert names == {"config.json", "weights", "deep/file"}
    content = (directory / "config.json").read_text()
    assert (directory / "weights").read_text() == content * 1000
    assert (directory / "deep" / "file").read_text() == content
    return content


def names_in(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def interrupted(step: int, action: Callable[[], object], how: str = "kill") -> bool:
    """Runs ``action`` in a fork that is killed, or gets Ctrl-C, before its step-th change. Returns whether it was."""
    child = os.fork()
    if child == 0:
        left = step

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left == -1 and how == "Ctrl-C":
                    raise KeyboardInterrupt
                if left < 0 and how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        with contextlib.suppress(BaseException):
            sys.addaudithook(hook)
            action()
            status = 0
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert how != "kill" or os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return status != 0


def refuse_to_rename(path: pathlib.Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: os.PathLike[str], target: os.PathLike[str], **options: object) -> None:
            if path in (pathlib.Path(source), pathlib.Path(target)):
                raise OSError(error, os.strerror(error), str(source))
            rename(source, target, **options)

        return renamed

    monkeypatch.setattr(os, "rename", refusing(os.rename))
    monkeypatch.setattr(os, "replace", refusing(os.replace))


def put_in(path: pathlib.Path, place: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "inside":
        for module in (directory, files, lock, waiting):
            monkeypatch.setattr(module, "filled_from_inside", lambda directory: directory == path and path.is_dir())
    if isinstance(place, int):
        refuse_to_rename(path, place, monkeypatch)


class Outputs(RuleBasedStateMachine):
    """Commands that write outputs, end in any way, and meet other commands and the user's files.

    Attributes:
        possible: the contents that an output may have: a kill leaves the old one or the new one. None: it is absent.
        killed: the outputs for which no command has cleaned up after a kill.
        kept: whether an interrupted command left intermediate results under that name. None: it may have.
        foreign: the user's entries, each with the output or the results that it is in, and its inode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = pathlib.Path(tempfile.mkdtemp()).resolve()
        self.patch = pytest.MonkeyPatch()
        self.version = 0
        self.possible: dict[str, set[str | None]] = {"a": {None}, "b": {None}, "c.gguf": {None}}
        self.killed: set[str] = set()
        self.kept: dict[str, bool | None] = dict.fromkeys(RESULTS, False)
        self.foreign: dict[pathlib.Path, tuple[str, int]] = {}
        (self.root / "a").mkdir()
        (self.root / "link").symlink_to("b")

    @initialize(place=st.sampled_from(PLACES))
    def choose_place(self, place: str | int) -> None:
        self.place = place
        put_in(self.root / "a", place, self.patch)

    def teardown(self) -> None:
        try:
            for name in sorted(self.killed):
                self.command(name, False, "", "refused")
            self.complete_or_absent()
        finally:
            self.patch.undo()
            shutil.rmtree(self.root)

    def content(self, name: str) -> str | None:
        path = self.root / name
        if name != "c.gguf":
            return content_of(path, set(self.foreign))
        return path.read_text().removeprefix("mark ") if path.exists() and path not in self.foreign else None

    def run(self, name: str, overwrite: bool, results: str, end: str, what: str = "") -> None:
        path = str(self.root / ("link" if name == "b" else name))
        claimed = claim_file(path, overwrite, ".gguf", "mark") if name == "c.gguf" else claim(path, overwrite)
        with claimed as output:
            output.check()
            with waiting.waiting(output, results) if results else contextlib.nullcontext() as found:
                if found is not None:
                    assert self.kept[f"{name}.{results}"] in (None, bool(found.found))
                    (found.directory / f"{self.version:0{RESULTS[found.directory.name]}}.safetensors").touch()
                if end == "refused":
                    raise UserError("an argument is wrong")
                with output.written("quantize") as partial:
                    fill(partial, str(self.version)) if partial.is_dir() else partial.write_text(f"mark {self.version}")
                    if end == "Ctrl-C":
                        raise KeyboardInterrupt
                    if end == "disk":
                        raise OSError(errno.ENOSPC, "No space left on device")
                    if end == "broken":
                        (partial / "link").symlink_to("nowhere")
                    if end in ("meanwhile", "annotated"):
                        self.killed.discard(name)  # the command has cleaned up
                        self.add(name if end == "meanwhile" else f"{name}.{results}", what)

    def attempt(self, *arguments: Any) -> None:
        with contextlib.suppress(UserError, KeyboardInterrupt):
            self.run(*arguments)

    def command(
        self, name: str, overwrite: bool, results: str, end: str = "kill", what: str = "", step: int = 0
    ) -> None:
        """A command ends as ``end`` says, or is killed before its step-th change of the file system."""
        if name == "c.gguf" or (name, self.place) == ("a", "inside"):
            results = ""
        if (end in ("broken", "meanwhile") and name == "c.gguf") or (end == "annotated" and not results):
            end = "done"
        self.version += 1
        before = self.possible[name]
        foreign = {name, f"{name}.{results}"} & {place for place, _ in self.foreign.values()}
        surely = not foreign and (overwrite or before == {None})
        perhaps = not foreign and (overwrite or None in before)
        if end != "kill":
            self.attempt(name, overwrite, results, end, what)
        elif interrupted(step, lambda: self.attempt(name, overwrite, results, "done")):
            self.killed.add(name)
            self.possible[name] = {*before, str(self.version)} if perhaps else before
            if results:
                self.kept[f"{name}.{results}"] = None
            return
        self.killed.discard(name)
        if end in ("done", "kill", "annotated"):
            before = {str(self.version)} if surely else {*before, str(self.version)} if perhaps else before
        assert self.content(name) in before
        self.possible[name] = {self.content(name)}
        if results and perhaps:
            self.kept[f"{name}.{results}"] = end not in ("done", "kill") if surely else None

    write = rule(
        **COMMANDS,
        end=st.sampled_from(["done", "Ctrl-C", "disk", "broken", "meanwhile", "annotated", "refused"]),
        what=st.sampled_from(sorted(FOREIGN)),
    )(command)
    kill = rule(**COMMANDS, step=st.integers(0, 60))(command)

    @rule(name=st.sampled_from(["a", "b", "c.gguf"]))
    def meet_another(self, name: str) -> None:
        """A command is rejected while another one holds the lock, and changes nothing."""
        with locked(self.root / name):
            before = listing(self.root)
            with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing there"):
                self.run(name, True, "", "done")
            assert listing(self.root) == before

    def add(self, name: str, what: str) -> None:
        path = self.root / name if name == "c.gguf" else self.root / name / what
        path.parent.mkdir(exist_ok=True, parents=True)
        if not os.path.lexists(path):
            FOREIGN["thesis.tex" if name == "c.gguf" else what](path)
            self.foreign[path] = name, path.lstat().st_ino

    @precondition(lambda self: not self.foreign)
    @rule(name=st.sampled_from(["a", "b", "c.gguf", *RESULTS]), what=st.sampled_from(sorted(FOREIGN)))
    def put(self, name: str, what: str) -> None:
        """The user puts something into an output or results, or under its name, and a command should overwrite it."""
        output, results = name.split(".") if name in RESULTS else (name, "")
        if output not in self.killed and (name not in RESULTS or (self.root / name).is_dir()):
            self.add(name, what)
            self.command(output, True, results, "done")

    @precondition(lambda self: self.foreign)
    @rule(data=st.data())
    def take_away(self, data: st.DataObject) -> None:
        """The user takes an entry away again."""
        path = data.draw(st.sampled_from(sorted(self.foreign)))
        del self.foreign[path]
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        while path.parent.name not in ("a", self.root.name) and not any(path.parent.iterdir()):
            path = path.parent
            path.rmdir()

    @invariant()
    def complete_or_absent(self) -> None:
        for name, possible in self.possible.items():
            with locked(self.root / name):  # also after the death of a process that held the lock
                assert name in self.killed or {self.content(name)} == possible
        for name, kept in self.kept.items():
            assert kept in (None, (self.root / name).exists())

    @invariant()
    def nothing_foreign_is_lost(self) -> None:
        assert all(path.lstat().st_ino == inode for path, (_, inode) in self.foreign.items())
        assert (self.root / "link").readlink() == pathlib.Path("b")

    @invariant()
    def nothing_unfinished_is_left(self) -> None:
        killed = re.compile(rf"(\.partial-\w+-)?({'|'.join(self.killed) or 'nothing'})\b")
        for path in {*self.root.rglob(".partial-*")} - {*self.foreign}:
            assert killed.match(str(path.relative_to(self.root)))
        names = {name for name in names_in(self.root) if not name.startswith(".partial-")}
        assert names <= {*self.possible, *RESULTS, "link"}


# Failures are not shrunk, which would take minutes, because every kill needs a fork.
Outputs.TestCase.settings = settings(
    max_examples=50, stateful_step_count=15, deadline=None, phases=[Phase.reuse, Phase.generate]
)
TestOutputs = Outputs.TestCase


def foreign_to_fill(directory: pathlib.Path) -> str | None:
    return foreign_in(directory, {"config.json", "weights", "deep/file"}.__contains__)


def replace(path: pathlib.Path) -> None:
    with files.staged_directory(path, foreign_to_fill) as partial:
        fill(partial, "new")


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
@pytest.mark.parametrize("place", PLACES[:3])
def test_interrupted_at_every_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, place: str | int, how: str
) -> None:
    """After Ctrl-C, the output is complete without recovery too."""
    path = tmp_path / "out"
    put_in(path, place, monkeypatch)
    seen = []
    for step in range(200):
        path.mkdir()
        fill(path, "old")
        ended = not interrupted(step, lambda: replace(path), how)
        if how == "Ctrl-C":
            assert [entry.name for entry in files.contents(path)] == ["config.json", "deep", "weights"]
        messages = files.recover(path)
        assert all(str(tmp_path) in message for message in messages)
        seen.append(content_of(path))
        assert names_in(tmp_path) == ["out"]
        assert files.recover(path) == []
        if ended:
            break
        subprocess.run(["rm", "-r", path], check=True)
    assert step > 10
    assert {*seen} == {"old", "new"}
    assert seen[-1] == "new"


@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_entries_are_put_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, place: str | int, name: str
) -> None:
    """They appear after the command has checked the output."""
    path = tmp_path / "out"
    put_in(path, place, monkeypatch)
    path.mkdir()
    fill(path, "old")
    FOREIGN[name](path / name)
    for change in (replace, lambda path: files.delete(path, tmp_path / "other", foreign_to_fill)):
        with pytest.raises(UserError, match=f"holds '{name}', which qlora-ext did not write"):
            change(path)
        assert os.path.lexists(path / name)
        assert (path / "config.json").read_text() == "old"
        assert names_in(tmp_path) == ["out"]


def test_killed_while_it_removes_the_kept_results(tmp_path: pathlib.Path) -> None:
    output, results = tmp_path / "out", tmp_path / "out.weights"
    seen = set()
    for step in range(100):
        results.mkdir(exist_ok=True)
        fill(results, "done") if not any(results.iterdir()) else None
        killed = interrupted(step, lambda: files.delete(results, output, foreign_to_fill))
        files.recover(output)
        assert names_in(tmp_path) in ([], [results.name]), step
        seen.add(content_of(results))
        if not killed:
            break
    assert step > 3
    assert seen == {"done", None}


@pytest.mark.parametrize("kind", ["weights", "calibration"])
def test_results_have_a_name_that_is_taken(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / f"out.{kind}"

    def marked(marker: dict[str, str], other: str = "{") -> None:
        path.mkdir()
        (path / MARKER).write_text(json.dumps(marker) if marker else other)

    for make in (
        lambda: path.write_text("mine"),
        path.mkdir,
        lambda: path.symlink_to(tmp_path),
        lambda: path.symlink_to("nowhere"),
        lambda: marked({"command": "quantize"}),
        lambda: marked({"waiting": kind, "output": "other"}),
        lambda: marked({"waiting": "other", "output": "out"}),
        lambda: marked({}),
        lambda: (path.mkdir(), os.mkfifo(path / MARKER)),
    ):
        make()
        before = listing(tmp_path)
        expected = f"{path} was not written by this command: .* name another --output"
        with pytest.raises(UserError, match=expected), claim(str(tmp_path / "out"), False) as output:
            waiting.waiting(output, kind).__enter__()
        assert listing(tmp_path) == before
        subprocess.run(["rm", "-r", path], check=True)


def test_another_error_of_renaming_loses_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    fill(path, "old")
    refuse_to_rename(path, errno.EIO, monkeypatch)
    with pytest.raises(UserError, match="cannot write"):
        replace(path)
    assert content_of(path) == "old"
    assert names_in(tmp_path) == ["out"]


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
    (tmp_path / ".partial-new-out-00000000").symlink_to(victim)
    (tmp_path / ".partial-new-file.json-00000000").symlink_to(victim / "precious")
    (tmp_path / ".partial-lock-out").symlink_to(victim / "precious")
    (tmp_path / ".partial-old-out-00000001").symlink_to(victim)
    (tmp_path / ".partial-gone-out-00000002").symlink_to(victim)
    (tmp_path / "lines.jsonl").symlink_to(victim / "precious")
    for write in (
        lambda: replace(tmp_path / "out"),
        lambda: files.write_json(tmp_path / "file.json", {}),
        lambda: files.append_json_line(tmp_path / "lines.jsonl", {}),
        locked(tmp_path / "out").__enter__,
    ):
        with pytest.raises(UserError, match="exists|cannot write|expected a lock file"):
            write()
    (tmp_path / "out").mkdir()
    files.recover(tmp_path / "out")
    assert listing(victim) == {"precious": b"kept"}


def test_a_lock_is_nothing_else(tmp_path: pathlib.Path) -> None:
    file = tmp_path / ".partial-lock-out"
    for make in (lambda path: path.write_text("mine\n"), os.mkfifo, pathlib.Path.mkdir):
        make(file)
        with pytest.raises(UserError, match=f"{file}: expected a lock file"), locked(tmp_path / "out"):
            pass
        assert file.exists()
        file.rmdir() if file.is_dir() else file.unlink()


def test_a_file_system_without_locks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with locked(tmp_path / "out"):
        assert "has no locks" in capfd.readouterr().err
    assert names_in(tmp_path) == []


def test_a_lock_that_cannot_be_signed_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock, "_sign", full)
    with pytest.raises(UserError, match="is full"), claim(str(tmp_path / "new" / "out"), False):
        pass
    assert names_in(tmp_path) == []


def test_recovery_touches_no_other_name(tmp_path: pathlib.Path) -> None:
    remaining = [
        ".partial-mine",
        ".partial-new-other-12345678",
        ".partial-new-out-1-12345678",
        ".partial-new-out-1234567",
        "out.bak",
    ]
    for name in (*remaining, ".partial-new-out-12345678"):
        (tmp_path / name).mkdir()
    assert len(files.recover(tmp_path / "out")) == 1
    assert files.recover(tmp_path) == []  # the same for foreign names inside
    assert names_in(tmp_path) == remaining


def test_the_old_directory_is_not_lost_if_its_name_is_taken(tmp_path: pathlib.Path) -> None:
    """A kill between the two renamings, after which another process takes the name."""
    for name in (".partial-old-out-12345678", ".partial-new-out-12345678", "out"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, name)
    [message, _] = files.recover(tmp_path / "out")
    assert "out.former-1" in message
    assert content_of(tmp_path / "out") == "out"
    assert content_of(tmp_path / "out.former-1") == ".partial-old-out-12345678"
    assert names_in(tmp_path) == ["out", "out.former-1"]
