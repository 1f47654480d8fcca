"""``finetune --resume --max-steps`` trains a finished run further, with its optimizer's state and new rows."""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from commands import SMALL, Paths, adapter_bytes, here, read_lines, stopped
from qlora_app.errors import UserError
from qlora_app.training import trainer
from qlora_app.training.settings import Settings, resumed
from qlora_app.training.trainer import StagedSampler


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """More data than the first run uses."""
    path = tmp_path_factory.mktemp("longer") / "many.jsonl"
    numbers = random.Random(1)
    rows = [{"prompt": f"count {i}", "completion": f"{numbers.random()}"} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def rows_taken() -> Iterator[list[Any]]:
    """The rows in the order in which they are trained on."""
    rows: list[Any] = []
    original = trainer.collate

    def collate(batch: Any) -> Any:
        rows.extend(tuple(row["input_ids"]) for row in batch)
        return original(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "collate", collate)
        yield rows


@pytest.fixture(scope="module")
def begun(paths: Paths, many: pathlib.Path) -> tuple[pathlib.Path, list[Any]]:
    """A run of 5 steps, and its rows. Tests copy it before they change it."""
    run = many.parent / "short"
    with rows_taken() as rows:
        begin(paths, many, run, "--max-steps", "5")
    return run, rows


@pytest.fixture(scope="module")
def short(begun: tuple[pathlib.Path, list[Any]]) -> pathlib.Path:
    return begun[0]


def begin(paths: Paths, data: pathlib.Path, run: pathlib.Path, *more: str) -> None:
    here("finetune", "--model", paths["model"], "--data", data, "--output", run, *SMALL, "--save-steps", "3", *more)


def steps_of(run: pathlib.Path) -> list[int]:
    return [int(line["step"]) for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def test_a_finished_run_is_made_longer(short: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The first steps equal those of the shorter run, and an interrupted run ends with the same bits."""
    run = pathlib.Path(shutil.copytree(short, tmp_path / "run"))
    before = adapter_bytes(run)
    printed = here("finetune", "--output", run, "--resume", "--max-steps", "9")
    assert "extending the run to 9 steps" in printed
    assert "resuming after step 5" in printed
    longer = adapter_bytes(run)
    assert longer != before
    assert steps_of(run) == list(range(1, 10))
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert metrics["steps"] == 9
    for name in ("loss", "grad_norm"):
        first, last = ([line[name] for line in read_lines(r / "metrics.jsonl") if name in line] for r in (short, run))
        assert last[:5] == first

    again = stopped(run, tmp_path, 8)
    assert (again / "checkpoint-6").is_dir()
    assert "extending" not in here("finetune", "--output", again, "--resume")
    assert adapter_bytes(again) == longer

    here("finetune", "--output", run, "--resume", "--max-steps", "9")
    assert adapter_bytes(run) == longer
    assert "(+0.0000)" in here(
        "merge", "--adapter", run, "--output", tmp_path / "merged", "--evaluate", "--dtype", "float32"
    )


def test_new_rows_are_taken_and_none_twice(begun: tuple[pathlib.Path, list[Any]], tmp_path: pathlib.Path) -> None:
    run = shutil.copytree(begun[0], tmp_path / "run")
    with rows_taken() as taken:
        here("finetune", "--output", run, "--resume", "--max-steps", "9")
    fresh = [row for row in taken if row not in {*begun[1]}]
    assert len(fresh) == len(set(fresh)) == 4 * 2  # rows per step


def test_the_first_epoch_continues_after_the_shorter_run(
    begun: tuple[pathlib.Path, list[Any]], tmp_path: pathlib.Path
) -> None:
    """A run extended before it finished trains on its original rows first, in their original order."""
    run, complete = shutil.copytree(begun[0], tmp_path / "run"), begun[1]
    shutil.rmtree(run / "checkpoint-5")
    with rows_taken() as taken:
        here("finetune", "--output", run, "--resume", "--max-steps", "7")
    held_out = len(complete) - 2 * 5  # measured before and after
    mid = len(complete) - held_out // 2
    assert taken[: 2 * 2] == complete[mid - 2 * 2 : mid]


def test_the_order_is_transformers_own() -> None:

    torch.manual_seed(3)
    theirs, ours = SeedableRandomSampler(range(11)), StagedSampler([11], 3)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)
    longer = StagedSampler([11, 15, 15], 3)
    theirs.set_epoch(0)
    assert list(longer)[:11] == list(theirs)
    assert sorted(list(longer)[11:]) == [11, 12, 13, 14]
    longer.set_epoch(1)
    assert sorted(longer) == list(range(15))


def test_a_schedule_that_depends_on_the_length(
    paths: Paths, many: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    begin(paths, many, run, "--max-steps", "4", "--lr-schedule", "linear", "--warmup-steps", "0")
    capfd.readouterr()
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    here("finetune", "--output", run, "--resume", "--max-steps", "8")
    assert "the linear schedule spans all 8 steps now: the learning rate at step 5 is 0.0015" in capfd.readouterr().out
    longer = adapter_bytes(run)
    # Stopped before a checkpoint was due. The shorter run's checkpoint has its last learning rate, which was 0.
    for name in ("adapter", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(run / name)
    shutil.copytree(tmp_path / "checkpoint-4", run / "checkpoint-4")
    here("finetune", "--output", run, "--resume")
    assert adapter_bytes(run) == longer


def test_more_epochs(paths: Paths, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    begin(paths, paths["data"], run, "--epochs", "1")
    first = steps_of(run)
    assert "extending the run to 2 epochs" in here("finetune", "--output", run, "--resume", "--epochs", "2")
    assert steps_of(run) == list(range(1, 2 * len(first) + 1))
    begin(paths, paths["data"], tmp_path / "at_once", "--epochs", "2")
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "at_once")


def test_invalid_arguments_are_rejected(refused: Any, short: pathlib.Path) -> None:
    before = (short / "settings.json").read_bytes()
    assert "a run can be made longer, not shorter" in refused(
        "finetune", "--output", short, "--resume", "--max-steps", 3
    )
    assert "--max-steps makes it longer" in refused("finetune", "--output", short, "--resume", "--epochs", 3)
    assert "started with 2" in refused("finetune", "--output", short, "--resume", "--max-steps", 9, "--rank", 4)
    assert f"is inside the run {short}" in refused("finetune", "--output", short / "adapter", "--resume")
    assert (short / "settings.json").read_bytes() == before


def test_lengths_are_recorded_in_their_order() -> None:
    first = resumed({"max_steps": 5}, {"max_steps": 9})
    assert (first.max_steps, first.former_steps, first.first_rows, first.stages) == (9, (5,), 20, [20, 36])
    again = resumed({"max_steps": 9, "former_steps": [5]}, {"max_steps": 20})
    assert again.former_steps == (5, 9)
    assert resumed({"epochs": 1.0}, {"epochs": 2.5}).former_steps == ()
    for damaged in ([9], [0], [-5, 3], [5, 5]):
        with pytest.raises(UserError, match="former_steps"):
            Settings(max_steps=9, former_steps=tuple(damaged))
