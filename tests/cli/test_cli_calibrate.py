"""``qlora-ext quantize --calibrate`` writes a 4-bit directory with a record."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

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
    return tmp_path / "model"


def quantize(model: pathlib.Path, output: pathlib.Path, *options: str) -> int:
    return main(["quantize", "--model", str(model), "--output", str(output), "--calibration-tokens", "1024", *options])


def load(path: pathlib.Path) -> Any:
    from transformers import AutoModelForCausalLM

    assert qlora_ext
    return AutoModelForCausalLM.from_pretrained(path)


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
