"""``qlora-ext quantize --calibrate`` writes a 4-bit directory with a record.

``--init-lora`` writes an adapter with which ``finetune --init-adapter`` starts, as with any other.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qlora_ext
from qlora_app.main import main
from qlora_app.outputs.directory import Output
from qlora_app.outputs.files import contents
from qlora_app.quantization import calibrate
from tiny_models import save_tiny_llama


@pytest.fixture
def model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    # Generating many short sequences takes less time.
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)
    save_tiny_llama(tmp_path / "model", seed=3)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 80)
    return tmp_path / "model"


def quantize(model: pathlib.Path, output: pathlib.Path, *options: str) -> int:
    return main(["quantize", "--model", str(model), "--output", str(output), "--calibration-tokens", "1024", *options])


def load(path: pathlib.Path) -> Any:
    assert qlora_ext
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def finetune(model: pathlib.Path, output: pathlib.Path, *options: str) -> int:
    data = str(model.parent / "text.txt")
    return main([
        "finetune", "--model", str(model), "--data", data, "--output", str(output), "--eval-size", "4", "--seq-len",
        "32", "--batch-size", "2", "--dtype", "float32", *options,
    ])  # fmt: skip


def weights(adapter: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def test_a_text_of_its_own(model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(model, tmp_path / "plain") == 0
    assert not (tmp_path / "plain" / "calibration.json").exists()
    assert quantize(model, tmp_path / "out", "--calibrate", "self", "--calibration-seed", "5") == 0
    assert "the error of their outputs is 0." in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (record["inputs"], record["tokens"], record["seed"]) == ("self", 1024, 5)
    assert len(record["layers"]) == 14
    assert all(layer["tokens"] == 1024 for layer in record["layers"])
    assert not (tmp_path / "out.calibration").exists()
    plain, calibrated = load(tmp_path / "plain"), load(tmp_path / "out")
    shapes = [{key: (t.dtype, t.shape) for key, t in m.state_dict().items()} for m in (plain, calibrated)]
    assert shapes[0] == shapes[1]
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(plain.get_submodule(name).weight, calibrated.get_submodule(name).weight)
    assert quantize(model, tmp_path / "again", "--calibrate", "self", "--calibration-seed", "5") == 0
    assert torch.equal(load(tmp_path / "again").get_submodule(name).weight, calibrated.get_submodule(name).weight)


def test_a_text_that_is_given(model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    assert quantize(model, tmp_path / "out", "--calibrate", str(tmp_path / "text.txt"), "--format", "bitsandbytes") == 0
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert record["seed"] is None
    assert all(layer["tokens"] == 1024 for layer in record["layers"])
    (tmp_path / "short.txt").write_text("abc")
    assert quantize(model, tmp_path / "other", "--calibrate", str(tmp_path / "short.txt")) == 2
    assert "expected a text of at least 8 tokens, got 3" in capsys.readouterr().err
    assert quantize(model, tmp_path / "other", "--calibrate", str(tmp_path / "none.txt")) == 2
    assert f"--calibrate {tmp_path / 'none.txt'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [True, False])
def test_results_are_kept_inside_a_mount_point(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """Results are kept inside a mount point, and inside a directory whose parent is not writable."""
    monkeypatch.setattr("qlora_app.outputs.waiting.filled_from_inside", lambda path: inside)
    output = tmp_path / "out"
    output.mkdir()
    waiting = output / ".partial-calibration" if inside else tmp_path / "out.calibration"
    options = calibrate.CalibrationOptions(calibrate="self", calibration_tokens=4096)
    with calibrate.stored_layers(options, Output(output, overwrite=False)) as directory:
        assert directory == waiting
        assert waiting.is_dir()
        assert contents(output) == []
        with calibrate.calibration(options, None, directory) as calibration:
            assert calibration is not None
            assert calibration.directory == directory
    assert list(tmp_path.rglob("*")) == [output]


def test_quantized_with_an_adapter_and_trained_on(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    four = tmp_path / "four"
    assert quantize(model, four, "--calibrate", "self", "--init-lora", "svd", "--init-rank", "8") == 0
    initial = four / "initial_adapter"
    config = json.loads((initial / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 8, str(four))
    assert len(weights(initial)) == 2 * 14
    ids = torch.randint(100, (2, 32))
    with torch.no_grad():
        exact, plain = (load(path)(ids).logits for path in (model, four))
        adapted = PeftModel.from_pretrained(load(four), initial)(ids).logits
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


def test_invalid_initial_adapters_are_rejected(
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


def test_distill(model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(tmp_path / "text.txt")
    longer = ["--calibration-tokens", "2048"]
    assert quantize(model, tmp_path / "calibrated", "--calibrate", text, *longer) == 0
    capsys.readouterr()
    assert quantize(model, tmp_path / "out", "--distill", text, *longer) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert record["method"].endswith("codes learnt from the dense model")
    assert record["inputs"] == text
    learnt = sum(layer["method"] == "distilled" for layer in record["layers"])
    assert learnt > 0
    assert f"distilled {learnt} of them" in printed
    assert not (tmp_path / "out.calibration").exists()
    files = [tmp_path / name / "model.safetensors" for name in ("calibrated", "out")]
    assert files[0].stat().st_size == files[1].stat().st_size
    one, other = map(load_file, files)
    assert {name for name in one if not torch.equal(one[name], other[name])}


def test_it_says_that_nothing_was_learnt(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 512)
    # One sequence, which leaves none to hold out.
    options = ["--calibration-tokens", "512", "--distill", str(tmp_path / "text.txt")]
    assert quantize(model, tmp_path / "out", *options) == 0
    assert "distilled none of them: no learnt codes were better" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert {layer["method"] for layer in record["layers"]} == {"feedback"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distill", "self", "--calibrate", "self"], "--calibrate and --distill exclude each other"),
        (["--distill", "self", "--init-lora", "svd"], "--distill and --init-lora exclude each other"),
        (["--distill", "missing.txt"], "--distill missing.txt: no such file or directory"),
        (["--distill", "self", "--distill-memory", "much"], "--distill-memory: expected a size such as 24GB"),
    ],
)
def test_wrong_options_of_distill(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert quantize(model, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
