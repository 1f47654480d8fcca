"""``quantize --init-lora`` writes an adapter with which ``finetune --init-adapter`` starts, as with any other."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import qlora_ext
from qlora_app.main import main
from tiny_models import save_tiny_llama


@pytest.fixture
def model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)
    save_tiny_llama(tmp_path / "model", seed=3)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 80)
    return tmp_path / "model"


def quantize(model: pathlib.Path, output: pathlib.Path, *options: str) -> int:
    return main(["quantize", "--model", str(model), "--output", str(output), "--calibration-tokens", "1024", *options])


def finetune(model: pathlib.Path, output: pathlib.Path, *options: str) -> int:
    data = str(model.parent / "text.txt")
    return main([
        "finetune", "--model", str(model), "--data", data, "--output", str(output), "--eval-size", "4", "--seq-len",
        "32", "--batch-size", "2", "--dtype", "float32", *options,
    ])  # fmt: skip


def weights(adapter: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def base(path: pathlib.Path) -> torch.nn.Module:
    assert qlora_ext
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_quantized_with_an_adapter_and_trained_on(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    four = tmp_path / "four"
    assert quantize(model, four, "--calibrate", "self", "--init-lora", "svd", "--init-rank", "8") == 0
    initial = four / "initial_adapter"
    config = json.loads((initial / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 8, str(four))
    assert len(weights(initial)) == 2 * 14
    ids = torch.randint(100, (2, 32))
    with torch.no_grad():
        exact, plain = (base(path)(ids).logits for path in (model, four))
        adapted = peft.PeftModel.from_pretrained(base(four), initial)(ids).logits
    assert (adapted - exact).norm() < 0.9 * (plain - exact).norm()

    options = "--init-adapter", str(initial), "--save-steps", "2"
    assert finetune(four, tmp_path / "run", *options, "--max-steps", "4") == 0
    trained = weights(tmp_path / "run" / "adapter")
    before = weights(initial)
    assert trained.keys() == before.keys()
    moved = max((trained[name] - before[name]).abs().max().item() for name in trained)
    assert 0 < moved < 0.05  # the run started from the adapter
    record = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (record["r"], record["lora_alpha"], record["lora_dropout"]) == (8, 8, 0.05)


def test_a_stopped_run_is_resumed(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(model, tmp_path / "first", "--max-steps", "2", "--rank", "4") == 0
    initial = tmp_path / "first"  # a run, which contains the adapter
    more = "--init-adapter", str(initial), "--save-steps", "1"
    assert finetune(model, tmp_path / "whole", *more, "--max-steps", "3") == 0
    assert finetune(model, tmp_path / "parts", *more, "--max-steps", "3") == 0
    for name in ("adapter", "checkpoint-3"):
        target = tmp_path / "parts" / name
        target.rename(tmp_path / f"moved-{name}")
    assert main(["finetune", "--output", str(tmp_path / "parts"), "--resume"]) == 0
    one, other = (weights(tmp_path / run / "adapter") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    path = initial / "adapter" / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in weights(initial / "adapter").items()}, path)
    assert main(["finetune", "--output", str(tmp_path / "parts"), "--resume"]) == 2
    assert "--init-adapter" in capsys.readouterr().err


def test_invalid_arguments_are_rejected(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, tmp_path / "out", "--init-lora", "svd") == 2
    assert "--init-lora svd needs the layers' inputs on a text; add --calibrate" in capsys.readouterr().err
    assert quantize(model, tmp_path / "out", "--init-lora", "loftq", "--init-rank", "0") == 2
    assert "--init-rank 0: expected 1 or more" in capsys.readouterr().err
    assert quantize(model, tmp_path / "four", "--init-lora", "loftq", "--format", "bitsandbytes") == 0
    assert (tmp_path / "four" / "initial_adapter" / "adapter_model.safetensors").is_file()
    assert quantize(tmp_path / "four", tmp_path / "out", "--init-lora", "loftq") == 2
    assert "--init-lora: expected a dense model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert finetune(model, tmp_path / "run", "--init-adapter", str(tmp_path / "none")) == 2
    assert f"--init-adapter {tmp_path / 'none'}: no such directory" in capsys.readouterr().err
    initial = str(tmp_path / "four" / "initial_adapter")
    assert finetune(model, tmp_path / "run", "--init-adapter", initial, "--rank", "4") == 2
    assert "--rank: the adapter of --init-adapter has its own" in capsys.readouterr().err
