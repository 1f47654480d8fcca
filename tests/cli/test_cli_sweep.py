"""``finetune --sweep``: adapters with the bits of single runs, kills, changed options, errors, and ``plan --sweep``."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import signal
from typing import Any

import pytest
import torch

import qlora_app
from commands import Paths, adapter_bytes, base, command, here, listing, read_lines
from qlora_app.main import main
from qlora_app.outputs.lock import locked
from qlora_app.outputs.ownership import foreign_in_output
from qlora_app.training.restoring import restored
from qlora_app.training.sweep_options import as_text, combinations, parse_sweep

# Options that change the base while an adapter is trained: hooks, a trained head, flags of its layers.
FIXED = ["--seq-len", "48", "--batch-size", "2", "--dropout", "0.1", "--eval-size", "1", "--max-steps", "3",
         "--save-steps", "2", "--modules-to-save", "lm_head", "--grad-checkpointing", "--mlp-chunk", "16"]  # fmt: skip
SWEEP = "lr=3e-3,1e-3 neftune-alpha=5,0"
NAMES = ["lr=0.003,neftune_alpha=5", "lr=0.003,neftune_alpha=0", "lr=0.001,neftune_alpha=5", "lr=0.001,neftune_alpha=0"]


def start_sweep(paths: Paths, output: pathlib.Path, *more: object) -> list[object]:
    return ["finetune", *base(paths), "--output", output, *FIXED, "--rank", "2", "--sweep", SWEEP, *more]


@pytest.fixture(scope="module")
def swept(paths: Paths) -> pathlib.Path:
    """The directory of a finished sweep. Tests copy it before they change it."""
    output = paths["root"] / "sweep"
    result = command(*start_sweep(paths, output))
    assert result.returncode == 0, result.stderr
    (paths["root"] / "sweep.txt").write_text(result.stdout)
    return output


def runs_of(sweep: pathlib.Path) -> list[pathlib.Path]:
    return [sweep / name for name in NAMES]


def test_each_adapter_is_that_of_its_own_run(paths: Paths, swept: pathlib.Path, tmp_path: pathlib.Path) -> None:
    single = ["finetune", *base(paths), *FIXED, "--rank", "2"]
    for name, rate, noise in ((NAMES[1], "0.003", "0"), (NAMES[2], "1e-3", "5")):
        run = tmp_path / name
        here(*single, "--output", run, "--lr", rate, "--neftune-alpha", noise)
        assert adapter_bytes(swept / name) == adapter_bytes(run)
        assert listing(swept / name).keys() == listing(run).keys()
    assert len({adapter_bytes(run) for run in runs_of(swept)}) == 4


def test_the_base_and_the_data_are_read_once(paths: Paths, swept: pathlib.Path) -> None:
    printed = (paths["root"] / "sweep.txt").read_text()
    assert printed.count("computing in ") == printed.count("text  ") == 1
    assert printed.count("trainable parameters") == 4
    for number, name in enumerate(NAMES, start=1):
        assert f"{number}/4  {name}\n" in printed


def test_optimizers_have_overrides_of_their_own(paths: Paths, tmp_path: pathlib.Path) -> None:
    """bitsandbytes' are global, and by the positions of parameters."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    manager = bnb.optim.GlobalOptimManager.get_instance()
    options = [
        "--seq-len",
        "48",
        "--batch-size",
        "2",
        "--eval-size",
        "1",
        "--max-steps",
        "2",
        "--optimizer",
        "adamw_8bit",
    ]
    try:
        for name in ("first", "second"):
            here("finetune", *base(paths), "--output", tmp_path / name, *options)
            assert not manager.module_weight_config_triple
            manager.index2config[0, 0] = {"lr": 100.0}  # of the user's own optimizer
        assert manager.index2config == {(0, 0): {"lr": 100.0}}
    finally:
        manager.initialize()
    assert adapter_bytes(tmp_path / "first") == adapter_bytes(tmp_path / "second")


def test_the_results(paths: Paths, swept: pathlib.Path) -> None:
    found = json.loads((swept / "sweep.json").read_text())
    assert found["sweep"] == {"lr": [0.003, 0.001], "neftune_alpha": [5.0, 0.0]}
    assert [adapter["name"] for adapter in found["adapters"]] == NAMES
    losses = {}
    for adapter in found["adapters"]:
        record = json.loads((swept / adapter["name"] / "adapter" / "qlora_run.json").read_text())
        assert adapter["metrics"] == record["metrics"]
        assert {name: record["settings"][name] for name in adapter["options"]} == adapter["options"]
        losses[adapter["name"]] = adapter["metrics"]["loss_after"]
    assert found["best"] == min(losses, key=losses.__getitem__)
    table = (paths["root"] / "sweep.txt").read_text().split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table[1:5]] == NAMES
    assert [line.split()[0] for line in table if line.endswith("best")] == [found["best"]]
    assert (swept / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_other_commands_take_an_adapter(refused: Any, swept: pathlib.Path) -> None:
    listed = [line.split()[0] for line in here("adapters", swept).splitlines()[1:]]
    assert listed == sorted(f"{name}/adapter" for name in NAMES)
    here("generate", "--adapter", swept / NAMES[0], "--max-new-tokens", "1", "count 3")
    assert "a sweep of several adapters" in refused("generate", "--adapter", swept, "count 3")


def kill_at_manifest(number: int) -> None:
    """Kills this process while it writes its checkpoint with that number."""
    from qlora_app.training import trainer

    written = 0
    write = trainer.write_manifest

    def or_kill(checkpoint: pathlib.Path) -> None:
        nonlocal written
        written += 1
        if written == number:
            os.kill(os.getpid(), signal.SIGKILL)
        write(checkpoint)

    trainer.write_manifest = or_kill


def test_a_killed_sweep_is_resumed(paths: Paths, swept: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The second of four adapters is interrupted while it writes its second checkpoint."""
    output = tmp_path / "sweep"
    killed = command(*start_sweep(paths, output), before=functools.partial(kill_at_manifest, 4))
    assert killed.returncode == -signal.SIGKILL
    assert [(run / "adapter").exists() for run in runs_of(output)] == [True, False, False, False]
    first = listing(runs_of(output)[0])
    result = command("finetune", "--output", output, "--resume", "--sweep", SWEEP)
    assert result.returncode == 0, result.stderr
    assert "3 adapters, one after the other" in result.stdout
    assert "resuming after step 2" in result.stdout
    assert listing(runs_of(output)[0]) == first
    for run, whole in zip(runs_of(output), runs_of(swept), strict=True):
        assert adapter_bytes(run) == adapter_bytes(whole)
        assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3]
    assert foreign_in_output(output) is None
    assert json.loads((output / "sweep.json").read_text()) == json.loads((swept / "sweep.json").read_text())


@pytest.fixture
def interrupted(swept: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the sweep without its last adapter, whose checkpoint of step 2 is the last one."""
    copied = pathlib.Path(shutil.copytree(swept, tmp_path / "sweep"))
    shutil.rmtree(copied / NAMES[3] / "adapter")
    shutil.rmtree(copied / NAMES[3] / "checkpoint-3")
    return copied


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sweep", "lr=3e-3,2e-3 neftune_alpha=5,0"], "was started with 'lr=0.003,0.001 neftune_alpha=5,0'"),
        (["--rank", "3"], "--rank 3: the run was started with 2"),
        (["--lr", "3e-3"], "--lr: --sweep varies it"),
        (["--max-steps", "4"], "--max-steps 4: a sweep cannot be made longer"),
        (["--model", "OTHER"], "--model"),
        (["--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_changed_options_are_rejected(
    refused: Any, paths: Paths, interrupted: pathlib.Path, options: list[str], said: str
) -> None:
    before = listing(interrupted)
    options = [str(paths["other"]) if option == "OTHER" else option for option in options]
    assert said in refused("finetune", "--output", interrupted, "--resume", *options)
    assert listing(interrupted) == before


def test_ctrl_c_says_how_to_go_on(
    interrupted: pathlib.Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(checkpoint: pathlib.Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_app.training.trainer.write_manifest", interrupt)
    assert main(["finetune", "--output", str(interrupted), "--resume"]) == 130
    said = f"step 2 is saved; continue with: qlora-ext finetune --output {interrupted} --resume"
    assert said in capfd.readouterr().err


def test_replaced_runs_are_rejected(refused: Any, interrupted: pathlib.Path) -> None:
    last = interrupted / NAMES[3]
    last.rename(interrupted / "away")
    assert f"{last}, a run of the sweep, is missing" in refused("finetune", "--output", interrupted, "--resume")
    shutil.copytree(interrupted / NAMES[0], last)
    message = refused("finetune", "--output", interrupted, "--resume")
    assert f"{last} was started with --lr 0.003" in message
    (interrupted / "sweep.json").write_text('{"sweep": {"rank": [1, 2]}, "adapters": []}')
    assert "sweep.json is damaged" in refused("finetune", "--output", interrupted, "--resume")


def test_a_run_that_another_process_trains_is_left_alone(refused: Any, interrupted: pathlib.Path) -> None:
    staged = interrupted / NAMES[3] / ".partial-new-checkpoint-3-0123abcd"
    staged.mkdir()
    with locked(interrupted / NAMES[3]):
        assert "is writing there" in refused("finetune", "--output", interrupted, "--resume")
        assert "writing there" in refused("finetune", "--output", interrupted / NAMES[3], "--resume")
    assert staged.exists()


def test_foreign_files_are_not_overwritten(refused: Any, paths: Paths, interrupted: pathlib.Path) -> None:
    for name in ("notes", f"{NAMES[1]}/notes", f"{NAMES[1]}/adapter/notes", "other/settings.json"):
        assert foreign_in_output(interrupted) is None
        (interrupted / name).parent.mkdir(exist_ok=True)
        (interrupted / name).touch()
        message = refused(*start_sweep(paths, interrupted, "--overwrite"))
        assert f"would also delete '{name}', which qlora-ext did not write" in message
        (interrupted / name).unlink()
    (interrupted / "other").rmdir()
    assert "already has a sweep; add --resume" in refused(*start_sweep(paths, interrupted))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sweep", "lrs=1,2"], "--sweep: unknown option lrs; did you mean lr?"),
        (["--sweep", "model=a,b"], "--sweep model: all adapters of a sweep have the same model"),
        (["--sweep", "dtype=float32,bfloat16"], "--sweep dtype: all adapters of a sweep have the same dtype"),
        (["--sweep", "output=a,b"], "--sweep: unknown option output"),
        (["--sweep", ""], "--sweep: no option"),
        (["--sweep", "lr="], "--sweep lr: no values"),
        (["--sweep", "lr=1e-4,"], "--sweep lr=: expected a number"),
        (["--sweep", "lr"], "--sweep lr: expected options with their values"),
        (["--sweep", "rank=8,x"], "--sweep rank=x: expected an integer"),
        (["--sweep", "dora=yes"], "--sweep dora=yes: expected true or false"),
        (["--sweep", "lr=1e-4,0.0001"], "--sweep lr: the value 0.0001 is given twice"),
        (["--sweep", "lr=1e-4 lr=2e-4"], "--sweep lr: given twice"),
        (["--sweep", "lr=1e-4", "--sweep", "lr=2e-4"], "--sweep lr: given twice"),
        (["--sweep", f"seed={','.join(map(str, range(51)))} rank=1,2"], "--sweep: 102 combinations"),
        (["--sweep", "rank=2,0"], "--sweep rank=0: --rank 0: expected a value of at least 1"),
        (["--sweep", "epochs=1 max_steps=5,6"], "--epochs and --max-steps exclude each other"),
        (["--sweep", "data=a/x.jsonl,b/x.jsonl"], "--sweep: two adapters would both be named data=x.jsonl"),
        (["--sweep", "rank=1,2", "--rank", "4"], "--rank: --sweep varies it"),
        (["--sweep", "rank=1,2", "--merge-aware", "q4_0"], "--sweep and --merge-aware q4_0 exclude each other"),
        (["--sweep", "rank=1,2", "--max-memory", "8GB"], "--sweep and --max-memory exclude each other"),
        (["--sweep", "rank=1,2", "--report-to", "wandb"], "--report-to wandb: a sweep reports to tensorboard only"),
        (["--sweep", "target_modules=q_proj,nothing"], "--target-modules nothing: no layer of the model"),
    ],
)
def test_invalid_sweeps_are_rejected(
    refused: Any, paths: Paths, tmp_path: pathlib.Path, options: list[str], said: str
) -> None:
    data = [] if "data" in options[1] else ["--data", paths["data"]]
    output = tmp_path / "sweep"
    assert said in refused("finetune", "--model", paths["model"], *data, "--output", output, *options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_no_sweep(refused: Any, paths: Paths, swept: pathlib.Path) -> None:
    for more in ([], ["--resume"]):
        message = refused(*start_sweep(paths, swept / NAMES[0], *more))
        assert "is a run of one adapter" in message


def test_values_and_names() -> None:
    values = parse_sweep("'data=my file.jsonl,OWNER/NAME' batch-size=1 dora=true,false alpha=16,0.5")
    assert values == {"data": ["my file.jsonl", "OWNER/NAME"], "batch_size": [1], "dora": [True, False],
                      "alpha": [16.0, 0.5]}  # fmt: skip
    assert parse_sweep(as_text(values)) == values
    names = list(combinations(values))
    assert names[0] == "data=my-file.jsonl,batch_size=1,dora=true,alpha=16"
    assert names[-1] == "data=NAME,batch_size=1,dora=false,alpha=0.5"


def test_an_adapter_that_diverges(
    refused: Any, paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are trained with the same bits, and resuming trains this one again."""
    from qlora_app.training import trainer

    learnt = trainer.learnt_loss

    def diverging(model: Any, *args: Any) -> Any:
        return learnt(model, *args) * (float("nan") if model.peft_config["default"].r == 3 else 1.0)

    small = ["finetune", *base(paths), "--seq-len", "48", "--max-steps", "2", "--eval-size", "1"]
    output = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learnt_loss", diverging)
        message = refused(*small, "--output", output, "--sweep", "rank=3,2")
    assert "--sweep: 1 of 2 adapters diverged (rank=3: the loss is nan at step 1" in message
    found = json.loads((output / "sweep.json").read_text())["adapters"]
    assert [adapter["metrics"] is None for adapter in found] == [True, False]
    here("finetune", "--output", output, "--resume")
    for rank in (2, 3):
        here(*small, "--output", tmp_path / str(rank), "--rank", rank)
        assert adapter_bytes(output / f"rank={rank}") == adapter_bytes(tmp_path / str(rank))


def test_python(swept: pathlib.Path, interrupted: pathlib.Path) -> None:
    """Resuming trains the last adapter, also where one was made longer by itself."""
    values = {"lr": [3e-3, 1e-3], "neftune_alpha": [5, 0]}
    qlora_app.finetune(output=interrupted / NAMES[0], resume=True, max_steps=4)
    with pytest.raises(ValueError, match="has a sweep; give its values with sweep"):
        qlora_app.finetune(output=interrupted, resume=True)
    done = qlora_app.finetune(output=interrupted, resume=True, sweep=values)
    assert list(done.runs) == NAMES
    assert [run.metrics["steps"] for run in done.runs.values()] == [4, 3, 3, 3]
    assert done.runs[NAMES[3]].adapter == interrupted / NAMES[3] / "adapter"
    assert adapter_bytes(interrupted / NAMES[3]) == adapter_bytes(swept / NAMES[3])
    assert done.best in NAMES


def test_sweeps_in_a_file(refused: Any, paths: Paths, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run.yaml").write_text("sweep: rank=2,0\nlr: 1e-4\n")
    arguments = ["finetune", *base(paths), "--output", tmp_path / "sweep", "--config", tmp_path / "run.yaml"]
    assert "--sweep rank=0: --rank 0" in refused(*arguments)
    assert "--sweep lr=0: --lr 0" in refused(*arguments, "--sweep", "lr=0")  # replaces both options in the file


def test_changes_of_a_model_are_undone() -> None:
    from tiny_models import make

    model = make()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks, use_cache = model.model._forward_hooks, model.config.use_cache
    with restored(model):
        model.model.register_forward_hook(print)
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(1, 1)
        model.model.forward = print
        model.config.use_cache = not use_cache
        model.lm_head.requires_grad_(False)
        model.gradient_checkpointing_enable()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.model._forward_hooks is hooks
    assert len(hooks) == 0
    assert model.config.use_cache == use_cache
    assert model.lm_head.weight.requires_grad


def test_plan_finds_the_largest_adapter(paths: Paths, swept: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    def planned(*more: object) -> dict[str, Any]:
        here("plan", "--model", paths["model"], "--json", "--memory", "8GB", *more)
        plan: dict[str, Any] = json.loads(capfd.readouterr().out)
        return plan

    both = planned("--seq-len", "48", "--sweep", "rank=2,8 lr=1,2,3")
    assert both["total"] == planned("--rank", "8", "--seq-len", "48")["total"]
    assert (both["sweep"]["largest"], both["sweep"]["adapters"]) == ("rank=8,lr=1", 6)
    files = [path for run in runs_of(swept) for path in run.rglob("*") if path.suffix in (".safetensors", ".pt")]
    head = ["--modules-to-save", "lm_head", "--device", "cpu"]  # which decides the dtype, like that of the sweep
    disk = planned("--rank", "2", "--seq-len", "48", *head, "--adapters", "4")["sweep"]["disk_bytes"]
    assert disk < sum(path.stat().st_size for path in files) < 1.2 * disk
