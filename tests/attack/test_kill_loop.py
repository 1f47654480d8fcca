"""Commands killed with SIGKILL at random moments leave a complete old or new output; ``--resume`` gives the same bits.

``QLORA_ATTACK`` is the number of kills per campaign, ``QLORA_ATTACK_SEED`` its seed. Half of the kills are at a random
time, half before a random change of the file system, because random times rarely hit short moments.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
import traceback

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from tqdm import tqdm

from commands import SMALL, Paths, adapter_bytes, base, here, read_lines
from qlora_app.main import main
from qlora_app.training.checkpoints import newest_checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("QLORA_ATTACK", "4"))
SEED = int(os.environ.get("QLORA_ATTACK_SEED", random.SystemRandom().randrange(1 << 32)))
RUN = [*SMALL, "--max-steps", "4", "--save-steps", "1"]
_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree", "open"}


class Victim:
    """Runs commands in forks of this process, which has imported their modules."""

    def __init__(self, campaign: str, folder: pathlib.Path) -> None:
        self.folder = folder
        self.moments: dict[object, tuple[float, int]] = {}
        self.random = random.Random(f"{campaign} {SEED}")
        print(f"{campaign}: {KILLS} kills, QLORA_ATTACK_SEED={SEED}")

    def _run(self, arguments: list[str], die_at: int | None) -> None:
        """Runs the command in the fork, and writes the number of its changes below the folder, or dies before one."""
        changes = 0

        def hook(event: str, details: tuple[object, ...]) -> None:
            nonlocal changes
            if event in _CHANGES and str(details[0]).startswith(str(self.folder)):
                if changes == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes += 1

        with pathlib.Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        torch.set_num_threads(1)  # the fork has no other threads
        tqdm.set_lock(threading.RLock())  # its own lock is shared with all forks, one of which died with it
        signal.alarm(120)
        sys.addaudithook(hook)
        status = main(arguments)
        os.write(self.pipe[1], f"{changes}".encode())
        os._exit(status)

    def _start(self, arguments: list[object], die_at: int | None = None) -> int:
        child = os.fork()
        if child == 0:
            try:
                self._run([str(argument) for argument in arguments], die_at)
            except BaseException:
                traceback.print_exc()
            os._exit(99)
        return child

    def measure(self, arguments: list[object]) -> None:
        """Lets a command end, and records its seconds and number of changes: the range of moments for kills."""
        self.pipe = os.pipe()
        begun = time.monotonic()
        assert os.waitpid(self._start(arguments), 0)[1] == 0
        self.moments[arguments[0]] = time.monotonic() - begun, int(os.read(self.pipe[0], 20))

    def kill(self, arguments: list[object]) -> str:
        """Runs and kills a command. Returns when; the command may have ended before."""
        seconds, changes = self.moments[arguments[0]]
        if self.random.random() < 0.5:
            die_at = self.random.randrange(changes)
            child, moment = self._start(arguments, die_at), f"before change {die_at} of {changes}"
        else:
            delay = self.random.uniform(0, seconds)
            child, moment = self._start(arguments), f"after {delay:.3f} s"
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), f"exit {status} {moment}, seed {SEED}"
        return f"{arguments[0]} killed {moment}, seed {SEED}"


def files_of(root: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def runs(paths: Paths) -> dict[str, pathlib.Path]:
    """Two finished runs with different seeds."""
    made = {}
    for seed in ("0", "1"):
        made[seed] = paths["root"] / f"attacked-{seed}"
        here("finetune", *base(paths), "--output", made[seed], *RUN, "--seed", seed)
    assert adapter_bytes(made["0"]) != adapter_bytes(made["1"])
    return made


def test_training(paths: Paths, runs: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    victim = Victim("training", tmp_path)
    arguments = ["finetune", *base(paths), *RUN, "--resume", "--output"]
    victim.measure([*arguments, tmp_path / "whole"])
    run = tmp_path / "run"
    for _ in range(KILLS):
        printed = victim.kill([*arguments, run])
        if run.exists():
            newest_checkpoint(run)  # raises if it is not complete
            assert (run / "settings.json").is_file(), printed
            if (run / "before.json").exists():
                assert json.loads((run / "before.json").read_text()), printed
            if (run / "loss.png").exists():
                assert (run / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82"), printed
            if (run / "metrics.jsonl").exists():
                assert read_lines(run / "metrics.jsonl"), printed
            if (run / "adapter").exists():
                assert adapter_bytes(run) == adapter_bytes(runs["0"]), printed
    here(*arguments, run)
    assert adapter_bytes(run) == adapter_bytes(runs["0"]), f"seed {SEED}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]
    assert not list(run.rglob(".partial*"))


def test_a_run_overwritten_by_a_run(paths: Paths, runs: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    victim = Victim("run over run", tmp_path)
    run = pathlib.Path(shutil.copytree(runs["0"], tmp_path / "run"))
    arguments = ["finetune", *base(paths), *RUN, "--seed", "1", "--overwrite", "--output", run]
    victim.measure(arguments)
    for _ in range(KILLS):
        shutil.rmtree(run)
        shutil.copytree(runs["0"], run)
        printed = victim.kill(arguments)
        here("finetune", "--output", run, "--resume")
        assert adapter_bytes(run) in (adapter_bytes(runs["0"]), adapter_bytes(runs["1"])), printed
        assert [path.name for path in tmp_path.iterdir()] == ["run"], printed
        assert not list(run.rglob(".partial*")), printed


@pytest.mark.parametrize("inside", [False, True], ids=["renamed", "filled"])
def test_a_model_overwritten_by_a_model(
    paths: Paths, runs: dict[str, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """quantize and merge, each overwriting the output of the other, also at a mount point."""
    from qlora_app.outputs import directory, files, lock, waiting

    output = tmp_path / "output"
    if inside:
        for module in (files, lock, directory, waiting):
            monkeypatch.setattr(module, "filled_from_inside", lambda path: path == output and path.is_dir())
    victim = Victim("model over model", tmp_path)
    commands = {
        "quantize": ["quantize", "--model", paths["model"], "--output", output, "--overwrite"],
        "merge": ["merge", "--adapter", runs["0"], "--output", output, "--overwrite"],
    }
    whole = {}
    for name, arguments in commands.items():
        victim.measure(arguments)
        whole[name] = files_of(output)
    present = "merge"
    for _ in range(KILLS):
        attempted = "quantize" if present == "merge" else "merge"
        printed = victim.kill(commands[attempted])
        # Any command cleans up first; this one is then rejected.
        assert main(["quantize", "--model", str(paths["model"]), "--output", str(output)]) == 2
        assert files_of(output) in whole.values(), printed
        present = next(name for name, content in whole.items() if content == files_of(output))
        left = {path.name for path in tmp_path.iterdir()}
        # The results of the killed quantize are kept, so that it can resume.
        assert left - {"output.weights"} == {"output"}, printed
        assert not (inside and len(left) > 1), printed
    assert main([str(argument) for argument in commands["quantize"]]) == 0
    assert files_of(output) == whole["quantize"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
