"""``qlora-ext export --calibrate``: weights in another format are encoded for the inputs of their layers."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

for library in ("transformers", "peft", "gguf", "compressed_tensors"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qlora_app
from commands import Paths, here
from gguf_files import write
from qlora_app.models import Loader, load_dense, resolve
from qlora_ext.form import Form
from tiny_models import make, save_tiny_llama, token_ids

Refused = Callable[..., str]
RATIO = re.compile(r"calibrated (\d+) weights: the error of their outputs is ([\d.]+) of the format's own recipe's")


@pytest.fixture
def model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)  # short sequences are written faster
    save_tiny_llama(tmp_path / "model", seed=3)
    return tmp_path / "model"


def adapt(base: pathlib.Path, adapter: pathlib.Path, size: float = 0.1) -> None:
    torch.manual_seed(4)
    model = get_peft_model(
        load_dense(resolve(str(base)), torch.float32, torch.device("cpu")),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data.mul_(size)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)


def export(to: str, output: pathlib.Path, *options: object) -> None:
    more = ["--calibration-tokens", 1024] if "--calibrate" in options else []
    here("export", "--to", to, "--output", output, "--check", "none", *options, *more)


def read(path: pathlib.Path) -> Any:
    return Loader(resolve(str(path)), Form(), torch.float32, torch.device("cpu"), torch.float32).while_loading()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(token_ids(8, 48)).logits.float()
    return found


@pytest.mark.parametrize("to", ["compressed-tensors:nvfp4", "gguf:q4_0"])
def test_the_outputs_are_closer_to_the_trained_model(
    model: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    adapt(model, tmp_path / "adapter")
    suffix = ".gguf" if to.startswith("gguf") else ""
    options = ["--adapter", tmp_path / "adapter"]
    export("dense", tmp_path / "dense", *options, "--dtype", "float32")
    export(to, tmp_path / f"recipe{suffix}", *options)
    capfd.readouterr()
    export(to, tmp_path / f"calibrated{suffix}", *options, "--calibrate", "self")
    printed = RATIO.search(capfd.readouterr().out)
    assert printed
    assert printed[1] == "14"
    assert float(printed[2]) < 0.9
    trained = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    recipe, calibrated = (
        (outputs(read(tmp_path / f"{name}{suffix}")) - trained).norm() for name in ("recipe", "calibrated")
    )
    assert calibrated < 0.95 * recipe
    if to.endswith("nvfp4"):
        state = load_file(tmp_path / "calibrated" / "model.safetensors")
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            factors = [state[f"model.layers.1.{name}.weight_global_scale"] for name in names]
            assert all(torch.equal(factor, factors[0]) for factor in factors)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated", dtype=torch.bfloat16)
        assert (outputs(theirs) - outputs(read(tmp_path / "calibrated"))).norm() < 0.02 * trained.norm()


def test_an_adapter_on_a_gguf_file(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)
    write(make("llama"), tmp_path / "base.gguf", "llama", kinds=["Q4_1"])
    adapt(tmp_path / "base.gguf", tmp_path / "adapter")
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
