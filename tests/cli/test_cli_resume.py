"""``--resume`` continues a run over the same base and data, from an unchanged checkpoint."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from commands import Paths, adapter_bytes, here, read_lines, stopped
from qlora_app.main import main
from qlora_app.training.identity import digest_of_model
from qlora_ext import QLoRAConfig, dtypes


@pytest.fixture
def run(paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A run with checkpoints of steps 8 and 11, with its own model and data."""
    shutil.copytree(paths["model"], tmp_path / "model")
    shutil.copy(paths["data"], tmp_path / "data.jsonl")
    run = stopped(finished_run, tmp_path, 8)
    settings = json.loads((run / "settings.json").read_text())
    settings |= {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl")}
    (run / "settings.json").write_text(json.dumps(settings))
    return run


def change_weight(model: pathlib.Path, name: str) -> None:
    """Changes one element of one tensor of a model."""
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    (found,) = (key for key in tensors if key.endswith(name))
    tensors[found].view(-1)[-1] += 1.0
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: pathlib.Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: change_weight(model, "layers.1.mlp.down_proj.weight"),
        lambda model: change_weight(model, "layers.0.input_layernorm.weight"),
        lambda model: change_weight(model, "embed_tokens.weight"),
        change_config,
    ],
    ids=["4-bit", "norm", "embeddings", "config"],
)
def test_another_base(refused, run: pathlib.Path, change: Callable[[pathlib.Path], None]) -> None:
    change(run.parent / "model")
    message = refused("finetune", "--output", run, "--resume")
    assert f"--model {run.parent / 'model'}" in message
    assert "--force" in message
    assert not (run / "adapter").exists()


def test_other_data(refused, run: pathlib.Path, finished_run: pathlib.Path) -> None:
    data = run.parent / "data.jsonl"
    original = data.read_text()
    data.write_text(original.replace("count 7", "count 70"))
    message = refused("finetune", "--output", run, "--resume")
    assert f"--data {data}" in message
    assert "--force" in message
    assert not (run / "adapter").exists()
    assert f"continuing, although --data {data}" in here("finetune", "--output", run, "--resume", "--force")
    assert adapter_bytes(run) != adapter_bytes(finished_run)


def test_another_tokenizer(refused, run: pathlib.Path) -> None:
    tokenizer = run.parent / "model" / "tokenizer.json"
    vocabulary = json.loads(tokenizer.read_text())
    letters = vocabulary["model"]["vocab"]
    letters["0"], letters["1"] = letters["1"], letters["0"]
    tokenizer.write_text(json.dumps(vocabulary))
    assert "tokens that --model" in refused("finetune", "--output", run, "--resume")


def test_layers_multiply_in_the_dtype_of_the_start(
    run: pathlib.Path, finished_run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a processor that would choose another dtype for new runs."""
    there = not dtypes.integer_products()
    monkeypatch.setattr(dtypes, "integer_products", lambda: there)
    here("finetune", "--output", run, "--resume")
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def test_moved_files_are_recognized(run: pathlib.Path, finished_run: pathlib.Path) -> None:
    (run.parent / "model").rename(run.parent / "moved")
    (run.parent / "data.jsonl").rename(run.parent / "moved.jsonl")
    moved = ["--model", run.parent / "moved", "--data", run.parent / "moved.jsonl"]
    here("finetune", "--output", run, "--resume", *moved)
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def test_a_run_without_digests(refused, run: pathlib.Path, finished_run: pathlib.Path) -> None:
    """Runs that earlier versions started."""
    (run / "qlora_output.json").unlink()
    assert "does not record which data" in refused("finetune", "--output", run, "--resume")
    here("finetune", "--output", run, "--resume", "--force")
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def test_nothing_to_resume(refused, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A mistyped directory must not start the default job; a script may resume what does not exist yet."""
    resume = ["finetune", "--output", str(tmp_path / "RNU"), "--resume"]
    nothing = f"--resume: --output {tmp_path / 'RNU'} has no run to continue"
    sweep = ["--sweep", "rank=2,4"]
    for more in (["--max-steps", "9"], sweep):
        assert f"{nothing}; to begin a new one" in refused(*resume, *more)
    (tmp_path / "config.yaml").write_text("rank: 2\nmodel: missing\n")
    for more in (["--model", "missing"], ["--model", "missing", *sweep], ["--config", str(tmp_path / "config.yaml")]):
        assert main([*resume, *more]) == 2
        out, err = capfd.readouterr()
        assert out.count(f"{nothing}: a new one begins") == 1
        assert "no directory missing" in err


def truncated(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def changed(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, truncated, changed], ids=["missing", "truncated", "changed"])
def test_a_damaged_checkpoint(
    refused, run: pathlib.Path, finished_run: pathlib.Path, damage: Callable[..., None]
) -> None:
    """This applies to each of its files."""
    names = sorted(path.name for path in (run / "checkpoint-8").iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} < {
        *names
    }
    for name in names:
        damage(run / "checkpoint-8" / name)
        message = refused("finetune", "--output", run, "--resume")
        assert str(run / "checkpoint-8") in message
        assert name in message or name == "manifest.json"  # changing this file causes an error about another
        assert "--overwrite" in message
        shutil.copy(finished_run / "checkpoint-8" / name, run / "checkpoint-8" / name)
    assert not (run / "adapter").exists()


def test_the_checkpoint_before_a_damaged_one(refused, run: pathlib.Path, finished_run: pathlib.Path) -> None:
    shutil.copytree(finished_run / "checkpoint-11", run / "checkpoint-11")
    (run / "checkpoint-11" / "optimizer.pt").unlink()
    message = refused("finetune", "--output", run, "--resume")
    assert f"{run / 'checkpoint-11'} is damaged: optimizer.pt is missing" in message
    assert "checkpoint-8 is complete: delete checkpoint-11" in message
    shutil.rmtree(run / "checkpoint-11")
    here("finetune", "--output", run, "--resume")
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def test_damaged_manifests(refused, run: pathlib.Path) -> None:
    manifest = run / "checkpoint-8" / "manifest.json"
    for content in (
        "",
        "{",
        "[]",
        "{}",
        '{"trainer_state.json": 5}',
        '{"trainer_state.json": {"size": "x"}}',
        "\udc80",
    ):
        manifest.write_bytes(content.encode(errors="surrogateescape"))
        message = refused("finetune", "--output", run, "--resume")
        assert str(run / "checkpoint-8") in message, content
    manifest.write_text(json.dumps({"../../data.jsonl": {}, "trainer_state.json": {}}))
    assert str(run / "checkpoint-8") in refused("finetune", "--output", run, "--resume")


def test_digests_do_not_depend_on_threads_or_order(paths: Paths) -> None:

    def digest(name: str) -> str:
        model = AutoModelForCausalLM.from_pretrained(
            paths[name], dtype=torch.bfloat16, quantization_config=QLoRAConfig()
        )
        return digest_of_model(model)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first = digest("model")
    torch.set_num_threads(threads)
    assert digest("model") == first
    assert digest("other") != first


def test_a_planted_checkpoint_is_no_checkpoint(run: pathlib.Path, finished_run: pathlib.Path) -> None:
    for name in ("checkpoint-x", "checkpoint-", ".partial-new-checkpoint-99-0123abcd"):
        (run / name).mkdir()
    (run / "checkpoint-99").write_text("a file")
    here("finetune", "--output", run, "--resume")
    assert adapter_bytes(run) == adapter_bytes(finished_run)
    assert not (run / ".partial-new-checkpoint-99-0123abcd").exists()
    assert os.path.isfile(run / "checkpoint-99")


def test_the_intervals_may_change(run: pathlib.Path, finished_run: pathlib.Path) -> None:
    """A checkpoint contains the intervals with which it was saved."""
    here("finetune", "--output", run, "--resume", "--save-steps", "9", "--eval-steps", "10")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-11", "checkpoint-9"]
    measured = [line["step"] for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert measured == [0, 10, 11]
    assert adapter_bytes(run) == adapter_bytes(finished_run)
