"""``qlora-ext export --calibrate``: weights in another format are encoded for the inputs of their layers."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="compressed_tensors is not installed")

from safetensors.torch import load_file

import qlora_app
from commands import Paths, here
from exports import Refused, adapt, dense, loaded, logits, output_of, read
from gguf_files import write
from tiny_models import make, save_tiny_llama, token_ids

IDS = token_ids(8, 48)
RATIO = re.compile(r"calibrated (\d+) weights: the error of their outputs is ([\d.]+) of the format's own recipe's")


@pytest.fixture(autouse=True)
def _short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)  # are written faster


def export(to: str, output: pathlib.Path, *options: object) -> None:
    more = ["--calibration-tokens", 1024] if "--calibrate" in options else []
    here("export", "--to", to, "--output", output, "--check", "none", *options, *more)


@pytest.mark.parametrize("to", ["compressed-tensors:nvfp4", "gguf:q4_0"])
def test_the_outputs_are_closer_to_the_trained_model(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    save_tiny_llama(tmp_path / "model", seed=3)
    adapt(tmp_path / "adapter", tmp_path / "model", dense(tmp_path / "model"), 0.01)
    (tmp_path / "recipe").mkdir()
    recipe, calibrated = output_of(to, tmp_path / "recipe"), output_of(to, tmp_path)
    options = ["--adapter", tmp_path / "adapter"]
    export("dense", tmp_path / "dense", *options, "--dtype", "float32")
    export(to, recipe, *options)
    capfd.readouterr()
    export(to, calibrated, *options, "--calibrate", "self")
    printed = RATIO.search(capfd.readouterr().out)
    assert printed
    assert printed[1] == "14"
    assert float(printed[2]) < 0.9
    trained = logits(read(tmp_path / "dense"), IDS)
    errors = [(logits(loaded(path), IDS) - trained).norm() for path in (calibrated, recipe)]
    assert errors[0] < 0.95 * errors[1]
    if to.endswith("nvfp4"):
        state = load_file(calibrated / "model.safetensors")
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            factors = [state[f"model.layers.1.{name}.weight_global_scale"] for name in names]
            assert all(torch.equal(factor, factors[0]) for factor in factors)
        theirs = logits(read(calibrated, torch.bfloat16), IDS)
        assert (theirs - logits(loaded(calibrated), IDS)).norm() < 0.02 * trained.norm()


def test_an_adapter_on_a_gguf_file(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.gguf"
    write(make("llama"), base, "llama", kinds=["Q4_1"])
    adapt(tmp_path / "adapter", base, dense(base), 0.01)
    options = ["--adapter", tmp_path / "adapter", "--calibrate", "self"]
    export("gguf:q4_0", tmp_path / "out.gguf", *options)
    printed = RATIO.search(capfd.readouterr().out)
    assert printed
    assert printed[1] == "14"
    assert float(printed[2]) < 1
    export("gguf:q4_1", tmp_path / "same.gguf", *options)
    out = capfd.readouterr().out
    assert "no layer was calibrated: all weights are in the format already, and keep their scales" in out
    assert "of the adapter's update" in out


def test_what_is_not_calibrated(refused: Refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    options = ["--model", paths["model"], "--output", tmp_path / "out.gguf", "--calibrate"]
    message = refused("export", "--to", "gguf:f16", *options, "self")
    assert "--calibrate self: --to gguf:f16 cannot calibrate this model" in message
    assert "the target has no 4-bit weights to encode" in message
    message = refused("export", "--to", "gguf:q4_0", *options, "self", "--calibration-tokens", 100)
    assert "--calibration-tokens 100: expected 512 or more" in message
    with pytest.raises(ValueError, match=r"none\.txt: no such file or directory"):
        qlora_app.export(
            model=paths["model"], to="gguf:q4_0", output=tmp_path / "out.gguf", calibrate=tmp_path / "none.txt"
        )
    assert not (tmp_path / "out.gguf").exists()
