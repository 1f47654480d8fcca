"""Output directories: only the command's own files are overwritten, by one process at a time."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import stat
import subprocess
import tempfile
import traceback

import pytest

from commands import RUN, Paths, adapter_bytes, base, command, here, listing, start, wait_for_step
from forks import Command
from qlora_app.main import main

SHORT = [*RUN, "--max-steps", "2"]


@pytest.fixture
def quantized(paths: Paths, tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory that ``quantize`` wrote, alone in its parent directory."""
    output = tmp_path / "outputs" / "quantized"
    here("quantize", "--model", paths["model"], "--output", output)
    return output


def test_directories_to_live_in_are_refused(
    refused, paths: Paths, quantized: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are rejected even if the command wrote all their files."""
    (quantized / "below").mkdir()
    before = listing(quantized)
    for place, names in {
        quantized: [".", quantized, quantized / "below" / "..", "/", "./."],
        quantized / "below": ["..", quantized, f"../../{quantized.name}"],
    }.items():
        monkeypatch.chdir(place)
        for name in names:
            message = refused("quantize", "--model", paths["model"], "--output", name, "--overwrite")
            assert "the working directory or contains it" in message
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(quantized / "below"))
    for name in ("~", "~/..", quantized):
        message = refused("finetune", *base(paths), "--output", name, "--overwrite")
        assert "the home directory or contains it" in message
    assert listing(quantized) == before


def test_names_that_no_directory_can_have(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("", " ", "a" * 300, "nul\0", "~nobody-of-that-name/run", tmp_path / "file", tmp_path / "file" / "run",
                 tmp_path / "loop"):  # fmt: skip
        for arguments in (["finetune", *base(paths)], ["quantize", "--model", paths["model"]]):
            assert "--output" in refused(*arguments, "--output", name, "--overwrite")
    assert (tmp_path / "file").read_text() == "kept"


def test_inputs_are_not_overwritten(refused, paths: Paths, quantized: pathlib.Path, finished_run: pathlib.Path) -> None:
    """Inputs are protected under their own names and under links to them, through them and in them."""
    outputs = quantized.parent
    (outputs / "link").symlink_to(quantized)
    (outputs / "model").mkdir()
    for entry in quantized.iterdir():
        (outputs / "model" / entry.name).symlink_to(f"../quantized/{entry.name}")
    run = pathlib.Path(shutil.copytree(finished_run, outputs / "run"))
    (run / "stdout.txt").unlink()
    shutil.copy(paths["data"], run / "adapter" / "data.jsonl")
    (run / "adapter" / "away").symlink_to(paths["model"])
    before = listing(outputs)
    quantize, finetune = ["quantize", "--overwrite"], ["finetune", "--overwrite"]
    for arguments in (
        [*quantize, "--model", quantized, "--output", quantized],
        [*quantize, "--model", outputs / "link", "--output", quantized],
        [*quantize, "--model", quantized, "--output", outputs / "link"],
        [*quantize, "--model", outputs / "model", "--output", quantized],
        [*quantize, "--model", run / ".." / "link", "--output", quantized / "." / ".." / "quantized"],
        [*quantize, "--model", quantized, "--output", quantized / "below"],
        [*quantize, "--model", quantized, "--output", outputs / "link" / "below"],
        [*quantize, "--model", run / "adapter" / "away", "--output", run],
        [*finetune, "--model", paths["model"], "--data", run / "adapter" / "data.jsonl", "--output", run],
        [*finetune, "--model", quantized, "--data", paths["data"], "--output", quantized],
        ["merge", "--overwrite", "--adapter", run, "--output", run],
        ["merge", "--overwrite", "--adapter", run / "adapter", "--output", run],
        ["merge", "--overwrite", "--adapter", run, "--output", run / "adapter" / "merged"],
        ["merge", "--overwrite", "--adapter", finished_run, "--model", quantized, "--output", quantized],
    ):
        message = refused(*arguments)
        assert "which --overwrite would delete" in message or "in which --overwrite deletes nothing" in message, message
        assert listing(outputs) == before
    # The base that an adapter names is an input too.
    record = json.loads((run / "adapter" / "qlora_run.json").read_text())
    (run / "adapter" / "qlora_run.json").write_text(json.dumps({**record, "model": str(quantized)}))
    message = refused("merge", "--overwrite", "--adapter", run, "--output", quantized)
    assert f"is or holds --model {quantized}" in message


def test_foreign_directories_are_not_overwritten(refused, paths: Paths, quantized: pathlib.Path) -> None:
    outputs = quantized.parent
    said = {}
    for name, file, content, message in (
        ("thesis", "chapter.tex", "irreplaceable", "not written by qlora-ext"),
        ("settings", "settings.json", '{"editor": "other software"}', "not written by qlora-ext"),
        ("annotated", "notes.txt", "irreplaceable", "'notes.txt'"),
        ("deep", "a/b/notes.txt", "irreplaceable", "'a/b/notes.txt'"),
        ("damaged", "qlora_output.json", '{"command": "quantize", "files": 5}', "damaged"),
    ):
        if message[0] == "n":
            (outputs / name).mkdir()
        else:
            shutil.copytree(quantized, outputs / name)
        (outputs / name / file).parent.mkdir(parents=True, exist_ok=True)
        (outputs / name / file).write_text(content)
        said[name] = message
    before = listing(outputs)
    for name, message in said.items():
        for arguments in (["quantize", "--model", paths["model"]], ["finetune", *base(paths)]):
            assert message in refused(*arguments, "--output", outputs / name, "--overwrite")
        assert listing(outputs) == before


def test_the_commands_own_files_are_overwritten(
    paths: Paths, finished_run: pathlib.Path, quantized: pathlib.Path
) -> None:
    run = pathlib.Path(shutil.copytree(finished_run, quantized.parent / "run"))
    (run / "stdout.txt").unlink()
    here("finetune", *base(paths), "--output", run, *SHORT, "--overwrite")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    for output in (quantized, run):
        here("merge", "--adapter", finished_run, "--output", output, "--overwrite")
        assert "quantization_config" not in json.loads((output / "config.json").read_text())
        assert not (output / "settings.json").exists()
        here("quantize", "--model", paths["model"], "--output", output, "--overwrite")
        assert "quantization_config" in json.loads((output / "config.json").read_text())
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["quantized", "run"]


def test_directories_above_come_and_go(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "a" / "b" / "c"
    refused("quantize", "--model", tmp_path / "missing", "--output", output)
    assert not list(tmp_path.iterdir())
    here("quantize", "--model", paths["model"], "--output", output)
    assert [path.name for path in output.parent.iterdir()] == ["c"]


def test_all_files_follow_the_umask(paths: Paths, tmp_path: pathlib.Path) -> None:
    """This includes files that other libraries write."""
    former = os.umask(0o002)
    try:
        here("finetune", *base(paths), "--output", tmp_path / "run", *SHORT)
        here("quantize", "--model", paths["model"], "--output", tmp_path / "quantized")
        here("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")
    finally:
        os.umask(former)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o775 if path.is_dir() else 0o664), path


def test_one_process_in_a_run(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    process = start(paths, run, "--max-steps", "500")
    try:
        wait_for_step(process, run, 1)
        for arguments in (
            ["finetune", *base(paths), "--output", run, "--resume"],
            ["finetune", *base(paths), "--output", run, "--overwrite"],
            ["quantize", "--model", paths["model"], "--output", run, "--overwrite"],
        ):
            message = refused(*arguments)
            assert f"process {process.pid} on {os.uname().nodename}" in message
            assert str(run) in message
    finally:
        process.kill()
    # The killed process's lock file still exists, but is not locked.
    assert f"{process.pid} " in (tmp_path / ".partial-lock-run").read_text()
    here("finetune", *base(paths), "--output", run, *SHORT, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_stopped_overwrite_is_reported_and_undone(
    paths: Paths, quantized: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The state after a kill between the two renamings: the old one is moved away, the new one is not in place."""
    before = listing(quantized)
    quantized.rename(quantized.with_name(".partial-old-quantized-0123abcd"))
    shutil.copytree(paths["model"], quantized.with_name(".partial-new-quantized-0123abcd"))
    status = main(["quantize", "--model", str(paths["model"]), "--output", str(quantized)])
    out, err = capfd.readouterr()
    assert status == 2
    assert "not empty" in err
    assert f"restored {quantized}" in out
    assert ".partial-new-quantized-0123abcd" in out
    assert listing(quantized.parent) == {"quantized": "directory", **{f"quantized/{k}": v for k, v in before.items()}}


def mounted(*arguments: object) -> None:
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("mounting needs privileges that this process does not have")


@pytest.mark.parametrize("kind", ["file system", "bind"])
def test_a_mount_point(paths: Paths, tmp_path: pathlib.Path, kind: str) -> None:
    """A Docker volume, and a directory mounted from the same file system, which only a failed renaming reveals."""
    output = tmp_path / "volume"
    output.mkdir()
    (tmp_path / "source").mkdir()
    if kind == "bind":
        mounted("--bind", tmp_path / "source", output)
    else:
        mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", output)
        (output / "lost+found").mkdir()
    kept = {"lost+found"} & {path.name for path in output.iterdir()}
    try:
        here("finetune", *base(paths), "--output", output, *RUN)
        adapter = adapter_bytes(output)
        here("finetune", "--output", output, "--resume")
        assert adapter_bytes(output) == adapter
        here("quantize", "--model", paths["model"], "--output", output, "--overwrite")
        here("finetune", *base(paths), "--output", output, *RUN, "--overwrite")
        assert adapter_bytes(output) == adapter
        names = {"adapter", "before.json", "checkpoint-11", "checkpoint-8", "loss.png", "metrics.jsonl",
                 "qlora_output.json", "settings.json"}  # fmt: skip
        assert {path.name for path in output.iterdir()} == names | kept
    finally:
        subprocess.run(["umount", output], check=True)


def test_a_parent_that_cannot_be_written_to() -> None:
    """Without root: directories made for the user are filled, but new ones cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    from qlora_app.errors import UserError
    from qlora_app.outputs.directory import claim

    def write(path: pathlib.Path, content: str) -> None:
        with claim(str(path), overwrite=True) as output:
            output.check()
            with output.written("quantize") as partial:
                (partial / "config.json").write_text(content)

    def as_nobody(root: pathlib.Path) -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        for content in ("first", "second"):
            write(root / "out", content)
            assert (root / "out" / "config.json").read_text() == content
        with pytest.raises(UserError, match="no permission"):
            write(root / "new", "third")

    # Not below tmp_path, which only pytest's user can read.
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        root.chmod(0o755)
        (root / "out").mkdir()
        os.chown(root / "out", 65534, 65534)
        child = os.fork()
        if child == 0:
            try:
                as_nobody(root)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
        assert names == ["out", "out/config.json", "out/qlora_output.json"]


def test_two_at_once(paths: Paths, tmp_path: pathlib.Path) -> None:
    """Of processes that start simultaneously, one continues and writes a complete output."""
    arguments = ["quantize", "--model", paths["model"], "--output", tmp_path / "a" / "out"]
    ended = [process.wait() for process in [Command(*arguments) for _ in range(3)]]
    message = [result.stderr for result in ended]
    assert sorted(result.returncode for result in ended) == [0, 2, 2], message
    assert all("writing there" in t or "not empty" in t or not t for t in message), message
    assert command("quantize", "--model", tmp_path / "a" / "out", "--output", tmp_path / "again").returncode == 0
    assert not list(tmp_path.rglob(".partial*"))
