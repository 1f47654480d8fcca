"""Runs with foreign files in them, unfinished work of other processes, and a run inside its own data."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil

import pytest

from commands import RUN, Paths, adapter_bytes, base, here, listing
from qlora_app.data import read_examples
from qlora_app.main import main
from qlora_app.outputs.lock import locked
from qlora_app.outputs.ownership import foreign_in_output

SHORT = [*RUN, "--max-steps", "2"]


@pytest.fixture
def run(finished_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    copied = pathlib.Path(shutil.copytree(finished_run, tmp_path / "run"))
    (copied / "stdout.txt").unlink()
    return copied


FOREIGN = (  # directories end in "/"
    "adapter/thesis.tex", "adapter/deep/thesis.tex", "adapter/empty/", "adapter/optimizer.pt",
    "checkpoint-8/photo.jpg", "checkpoint-8/deep/photo.jpg", "checkpoint-3/photo.jpg", "checkpoint-3/", "notes",
    "empty/", "quantized/config.json", ".partial-new-quantized-12345678/", ".partial-lock-quantized",
)  # fmt: skip


def test_foreign_files_in_a_run_are_not_overwritten(refused, paths: Paths, run: pathlib.Path) -> None:
    commands = itertools.cycle([["finetune", *base(paths), *SHORT], ["quantize", "--model", paths["model"]]])
    for name in FOREIGN:
        assert foreign_in_output(run) is None
        path = run / name
        made = not path.parent.exists()
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()
        before = listing(run)
        message = refused(*next(commands), "--output", run, "--overwrite")
        assert f"--overwrite would also delete '{name.rstrip('/')}', which qlora-ext did not write" in message
        assert listing(run) == before
        path.rmdir() if name.endswith("/") else path.unlink()
        if made:
            path.parent.rmdir()


def test_runs_of_versions_before_are_ours(paths: Paths, run: pathlib.Path) -> None:
    """Adapters of earlier versions do not list their files. A damaged checkpoint is not foreign."""
    record = json.loads((run / "adapter" / "qlora_run.json").read_text())
    assert set(record.pop("files")) == {path.name for path in (run / "adapter").iterdir()} - {"qlora_run.json"}
    (run / "adapter" / "qlora_run.json").write_text(json.dumps(record))
    (run / "checkpoint-8" / "manifest.json").write_text("{")
    (run / "checkpoint-11" / "manifest.json").unlink()
    assert foreign_in_output(run) is None
    here("finetune", *base(paths), *SHORT, "--output", run, "--overwrite")


def test_a_resumed_run_deletes_no_foreign_files(
    refused, run: pathlib.Path, finished_run: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither an adapter that is replaced nor an outdated checkpoint is deleted with foreign files."""
    (run / "adapter" / "thesis.tex").write_text("mine")
    before = listing(run)
    assert "adapter holds 'thesis.tex'" in refused("finetune", "--output", run, "--resume")
    assert listing(run) == before
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-11")
    (run / "checkpoint-2").mkdir()
    for old, name in (("checkpoint-3", "photo.jpg"), ("checkpoint-4", "manifest.json")):
        shutil.copytree(run / "checkpoint-8", run / old)
        (run / old / name).unlink(missing_ok=True)
        (run / old / "photo.jpg").write_text("mine")
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-5")
    here("finetune", "--output", run, "--resume")
    printed = capfd.readouterr().out
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-4"):
        assert f"note: {name} is kept: " in printed
    assert "holds 'photo.jpg', which qlora-ext did not write" in printed
    names = ["checkpoint-11", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-8"]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == names
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def unfinished(folder: pathlib.Path, name: str) -> None:
    for kind in ("new", "old", "gone", "placing"):
        directory = folder / f".partial-{kind}-{name}-0123abcd"
        directory.mkdir()
        (directory / "weights").write_text(kind)


def test_a_refused_command_leaves_the_work_of_others(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("out1", "out2", "settings.json", "adapter", "shared.weights"):
        unfinished(shared, name)
    (shared / "settings.json").write_text("{}")
    with locked(shared / "out1"):
        before = listing(tmp_path)
        for arguments in (
            ["quantize", "--model", paths["model"]],
            ["quantize", "--model", paths["model"], "--overwrite"],
            ["finetune", *base(paths)],
            ["finetune", *base(paths), "--overwrite"],
            ["finetune", *base(paths), "--resume"],
        ):
            refused(*arguments, "--output", shared)
            assert listing(tmp_path) == before
        assert "writing there" in refused("quantize", "--model", paths["model"], "--output", shared / "out1")
        assert listing(tmp_path) == before


def test_a_run_recovers_its_own_names_alone(paths: Paths, run: pathlib.Path, finished_run: pathlib.Path) -> None:
    """Each name has its own lock, because another process may write OUTPUT/adapter as its output."""
    for name in ("metrics.jsonl", "checkpoint-9", "quantized", "adapter"):
        directory = run / f".partial-new-{name}-0123abcd"
        directory.mkdir()
    with locked(run / "adapter"):
        here("finetune", "--output", run, "--resume")
        left = {path.name for path in run.glob(".partial-*")}
        assert left == {".partial-new-quantized-0123abcd", ".partial-new-adapter-0123abcd", ".partial-lock-adapter"}
    here("finetune", "--output", run, "--resume")
    assert {path.name for path in run.glob(".partial-*")} == {".partial-new-quantized-0123abcd"}
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def test_files_that_options_name(
    refused, paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """check --json and plan --plot replace only files that they wrote."""
    model = pathlib.Path(shutil.copytree(paths["model"], tmp_path / "model"))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "link.json").symlink_to("notes.json")
    (tmp_path / "directory").mkdir()
    before = listing(tmp_path)
    check, plan = ["check", "--model", model, "--json"], ["plan", "--model", model, "--memory", "1GB", "--plot"]
    for name in ("model/config.json", "model/model.safetensors"):
        assert f"is a file of --model {model}" in refused(*check, tmp_path / name)
    for name in ("notes.json", "link.json", "directory"):
        assert "the file exists and this command did not write it" in refused(*check, tmp_path / name)
        assert "the file exists and this command did not write it" in refused(*plan, tmp_path / name)
    assert listing(tmp_path) == before
    for _ in range(2):
        here(*plan, tmp_path / "plan.png")
        here(*check, tmp_path / "check.json", "--data", paths["data"], "--tokens", 512, "--max-increase", 9)


def test_a_run_inside_of_its_data(
    paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run inside its data directory is not part of the data, neither when resumed nor for another run."""
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    shutil.copy(paths["data"], data / "pairs.jsonl")
    shutil.copy(paths["data"], data / "more" / "pairs.jsonl")
    monkeypatch.chdir(data)
    expected = list(read_examples("."))
    here("finetune", "--model", paths["model"], "--data", ".", *SHORT, "--output", "run")
    here("quantize", "--model", paths["model"], "--output", "more/run.weights")
    unfinished(data, "other")
    (data / ".partial-new-other-0123abcd" / "settings.json").write_text("{}")
    assert list(read_examples(".")) == expected
    capfd.readouterr()
    adapter = adapter_bytes(data / "run")
    for name in ("adapter", "checkpoint-2"):
        shutil.rmtree(data / "run" / name)
    here("finetune", "--output", "run", "--resume")
    assert adapter_bytes(data / "run") == adapter
    printed = capfd.readouterr().out
    assert "left out: more/run.weights/ (written by qlora-ext), run/ (written by qlora-ext)" in printed
    here("finetune", "--model", paths["model"], "--data", ".", *SHORT, "--output", "again")
    assert adapter_bytes(data / "again") == adapter


def test_a_streamed_run_replaces_its_own_base(
    refused, paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another dtype, block size or model needs another base. A base that a user made is not replaced."""
    run, made = tmp_path / "run", tmp_path / "run-base"
    command = ["finetune", "--data", paths["data"], *SHORT, "--output", run, "--stream", "disk"]
    here(*command, "--model", paths["model"])
    for options in (["--dtype", "float32"], ["--block-size", "128"], ["--model", paths["other"]]):
        options = options if "--model" in options else ["--model", paths["model"], *options]
        before = (made / "quantized_from.json").read_text()
        here(*command, *options, "--overwrite")
        assert (made / "quantized_from.json").read_text() != before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-base"]
    shutil.rmtree(run)
    capfd.readouterr()
    before = listing(tmp_path)
    message = refused(*command, "--model", paths["model"])
    assert "run-base is the 4-bit base of a run with another model" in message
    assert "--overwrite" in message
    assert listing(tmp_path) == before
    (made / "thesis.tex").touch()
    message = refused(*command, "--model", paths["model"], "--overwrite")
    assert "would also delete 'thesis.tex'" in message
    shutil.rmtree(made)
    here("quantize", "--model", paths["other"], "--output", made)
    capfd.readouterr()
    before = listing(tmp_path)
    message = refused(*command, "--model", paths["model"], "--overwrite")
    assert "is not the 4-bit base of a streamed run" in message
    assert listing(tmp_path) == before
    assert main(["quantize", "--model", str(paths["model"]), "--output", str(made), "--overwrite"]) == 0
