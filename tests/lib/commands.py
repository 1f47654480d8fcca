"""Runs the console command in this or another process; makes a tiny random Llama, its data and a finished run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from forks import Command

Paths = dict[str, pathlib.Path]
COMMAND = [sys.executable, "-c", "import sys; from qlora_app.__main__ import main; sys.exit(main())"]
# Adapters of rank 2 on short texts; more than one epoch, dropout, and a last step without a checkpoint.
SMALL = ["--rank", "2", "--seq-len", "48", "--batch-size", "2", "--lr", "0.003", "--dropout", "0.1", "--eval-size", "4"]
RUN = [*SMALL, "--max-steps", "11", "--save-steps", "4"]


def environment() -> dict[str, str]:
    # One thread: a step of the tiny model is too short for several threads, especially on a busy machine.
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments: object, before: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a fork."""
    return Command(*arguments, before=before).wait()


def here(*arguments: object) -> str:
    """Runs the command in this process, if the test needs no separate one, and returns what it printed."""
    from qlora_app.main import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main([str(argument) for argument in arguments]) == 0
    finally:
        torch.set_num_threads(threads)
        sys.stdout.write(printed.getvalue())
    return printed.getvalue()


def base(paths: Paths) -> list[object]:
    return ["--model", paths["model"], "--data", paths["data"]]


def start(paths: Paths, run: pathlib.Path, *more: str) -> Command:
    return Command("finetune", *base(paths), "--output", run, *RUN, *more)


def wait_for_step(process: Command, run: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and max(line["step"] for line in read_lines(metrics)) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached (exit code {process.poll()})")


def stopped(run: pathlib.Path, directory: pathlib.Path, step: int) -> pathlib.Path:
    """A copy of a finished run as one that was stopped after the checkpoint of a step."""
    copy = pathlib.Path(shutil.copytree(run, directory / f"stopped-{run.name}"))
    shutil.rmtree(copy / "adapter")
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    return copy


def adapter_bytes(run: pathlib.Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def listing(root: pathlib.Path) -> dict[str, bytes | str]:
    """All files below a directory, with their contents."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "directory"
    return found


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Paths of a model, another model of the same shape, and training pairs that continue counting from a number."""
    from tiny_models import save_tiny_llama

    root = tmp_path_factory.mktemp("cli")
    save_tiny_llama(root / "model", 0)
    save_tiny_llama(root / "other", 1)
    numbers = random.Random(0)
    with (root / "pairs.jsonl").open("w") as file:
        for i in range(18):
            counted = " ".join(str(i + j) for j in range(numbers.randint(3, 9)))
            file.write(json.dumps({"prompt": f"count {i}", "completion": counted}) + "\n")
    return {"root": root, "model": root / "model", "other": root / "other", "data": root / "pairs.jsonl"}


@pytest.fixture(scope="session")
def finished_run(paths: Paths) -> pathlib.Path:
    """The directory of an uninterrupted run. Tests copy it before they change it."""
    run = paths["root"] / "whole"
    result = command("finetune", *base(paths), "--output", run, *RUN)
    assert result.returncode == 0, result.stderr
    (run / "stdout.txt").write_text(result.stdout)
    return run


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process. It must end with exit code 2 and one sentence, which is returned."""
    from qlora_app.main import main

    def run(*arguments: object) -> str:
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capfd.readouterr()
        assert status == 2, err
        assert err.count("\n") == 1, err
        assert err.startswith("qlora-ext")
        assert "Traceback" not in out + err
        return err

    return run
