"""bitsandbytes in diffusers: checkpoints load, the configuration is taken over, models are adopted."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from diffusers import BitsAndBytesConfig
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from peft import LoraConfig
from safetensors.torch import load_file

import qlora_ext
from qlora_ext import QLoRAConfig
from qlora_ext.integrations.peft import LoraLinear4bit
from qlora_ext.nn import Linear4bit
from tensors import same_bits
from tiny_diffusers import KINDS, make, output

DTYPE = torch.bfloat16
WEIGHTS = "diffusion_pytorch_model.safetensors"


def config(**options: Any) -> BitsAndBytesConfig:
    arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPE, **options}
    return BitsAndBytesConfig(**arguments)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets diffusers use bitsandbytes without a GPU, which bitsandbytes supports."""
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *args, **kwargs: None)


@pytest.fixture
def taken_over() -> Iterator[None]:
    before = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    from qlora_ext.integrations.diffusers import take_over

    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = take_over._quantizer
    yield
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = before


def ours(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def theirs(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def equal_files(a: pathlib.Path, b: pathlib.Path) -> bool:
    return same_bits(load_file(a / WEIGHTS), load_file(b / WEIGHTS))


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("flux", {}),
    "double quantized, and modules in float32": ("wan", {"bnb_4bit_use_double_quant": True}),
    "stored as bfloat16": ("sd3", {"bnb_4bit_quant_storage": torch.bfloat16}),
    "layers skipped": ("flux", {"llm_int8_skip_modules": ["proj_out", "to_q"]}),
}


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)
def test_bitsandbytes_checkpoints_load_and_its_models_are_adopted(
    kind: str, options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    dense = make(kind, DTYPE)
    dense.save_pretrained(tmp_path / "dense")

    def load(directory: str, quantization_config: Any = None, **more: Any) -> Any:
        return type(dense).from_pretrained(
            tmp_path / directory, torch_dtype=DTYPE, quantization_config=quantization_config, **more
        )

    model = load("dense", config(**options), device_map="cpu")
    names = set(theirs(model))
    assert names
    decoded = {
        name: bnb.functional.dequantize_4bit(m.weight.reshape(-1, 1).view(torch.uint8), m.weight.quant_state)
        for name, m in theirs(model).items()
        if m.in_features % 64 == 0  # otherwise bitsandbytes decodes incorrectly on a CPU
    }
    model.save_pretrained(tmp_path / "theirs")

    read = load("theirs", QLoRAConfig())
    assert set(ours(read)) == names
    assert all(torch.equal(ours(read)[name].dequantize(), weight) for name, weight in decoded.items())
    assert isinstance(read.config.quantization_config, QLoRAConfig)
    y = output(read, kind, DTYPE)
    read.save_pretrained(tmp_path / "ours")
    assert torch.equal(output(load("ours"), kind, DTYPE), y)

    quantized = load("dense", QLoRAConfig.from_bitsandbytes(config(**options)))
    assert set(ours(quantized)) == names  # the mean of double-quantized scales may differ in its last bit
    assert all(
        torch.equal(layer.weight.packed, ours(read)[name].weight.packed) for name, layer in ours(quantized).items()
    )

    adoption = qlora_ext.adopt(model)
    assert set(adoption.adopted) == names
    assert torch.equal(output(model, kind, DTYPE), y)
    model.save_pretrained(tmp_path / "adopted")
    assert equal_files(tmp_path / "adopted", tmp_path / "theirs")
    assert torch.isfinite(output(model.dequantize(), kind, DTYPE)).all()


@pytest.mark.skipif(
    not hasattr(DiffusersQuantizer, "maybe_update_state_dict"),
    reason="this diffusers does not show a quantizer files without a weight",
)
@pytest.mark.usefixtures("on_cpu")
def test_a_weight_and_its_scales_may_be_in_different_shards(tmp_path: pathlib.Path) -> None:
    dense = make("sd3", DTYPE)
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(
        tmp_path / "dense", torch_dtype=DTYPE, quantization_config=config(), device_map="cpu"
    )
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    index = json.loads((tmp_path / "shards" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert any(index[name] != index[f"{name}.absmax"] for name in index if f"{name}.absmax" in index)
    whole, shards = (
        type(dense).from_pretrained(tmp_path / name, torch_dtype=DTYPE, quantization_config=QLoRAConfig())
        for name in ("whole", "shards")
    )
    assert torch.equal(output(whole, "sd3", DTYPE), output(shards, "sd3", DTYPE))


@pytest.mark.usefixtures("taken_over")
@pytest.mark.parametrize("kind", KINDS)
def test_a_script_for_bitsandbytes_runs_on_a_cpu(
    kind: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dense = make(kind, DTYPE)
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(
        tmp_path / "dense",
        torch_dtype=DTYPE,
        quantization_config=config(bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["proj_out"]),
    )
    assert theirs(model).keys() == ours(model).keys()
    assert f"qlora_ext: {len(ours(model))} linear layers in NF4 instead of bitsandbytes'" in capfd.readouterr().err
    assert model.is_loaded_in_4bit
    assert isinstance(model.config.quantization_config, BitsAndBytesConfig)
    assert model.num_parameters() == dense.num_parameters()
    y = output(model, kind, DTYPE)
    model.save_pretrained(tmp_path / "4bit")
    assert any("quant_state.bitsandbytes__nf4" in key for key in load_file(tmp_path / "4bit" / WEIGHTS))
    again = type(dense).from_pretrained(tmp_path / "4bit", torch_dtype=DTYPE)
    assert torch.equal(output(again, kind, DTYPE), y)
    again.save_pretrained(tmp_path / "again")
    assert equal_files(tmp_path / "again", tmp_path / "4bit")
    again.dequantize()
    assert not again.is_loaded_in_4bit
    assert not ours(again)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    assert any(isinstance(m, LoraLinear4bit) for m in model.modules())


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_bitsandbytes_reads_models_saved_while_it_was_taken_over(tmp_path: pathlib.Path) -> None:
    dense = make("sd3", DTYPE)
    dense.save_pretrained(tmp_path / "dense")
    script = (
        "import sys, torch, qlora_ext\n"
        "qlora_ext.take_over_bitsandbytes()\n"
        "assert 'diffusers' not in sys.modules\n"
        "from diffusers import BitsAndBytesConfig, SD3Transformer2DModel\n"
        "config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',\n"
        "                            bnb_4bit_compute_dtype=torch.bfloat16)\n"
        "model = SD3Transformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16,\n"
        "                                              quantization_config=config)\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "dense"), str(tmp_path / "ours")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "qlora_ext: 32 linear layers" in run.stderr
    by_them = type(dense).from_pretrained(
        tmp_path / "dense", torch_dtype=DTYPE, quantization_config=config(), device_map="cpu"
    )
    by_them.save_pretrained(tmp_path / "theirs")
    assert equal_files(tmp_path / "ours", tmp_path / "theirs")
    read = type(dense).from_pretrained(tmp_path / "ours", torch_dtype=DTYPE, device_map="cpu")
    assert type(next(iter(theirs(read).values()))) is bnb.nn.Linear4bit


def test_other_kinds_of_bitsandbytes_are_named() -> None:
    for options in ({"bnb_4bit_quant_type": "fp4"}, {"load_in_4bit": False, "load_in_8bit": True}):
        with pytest.raises(ValueError, match="expected a bitsandbytes NF4 checkpoint, got"):
            QLoRAConfig.from_bitsandbytes(config(**options))


@pytest.mark.usefixtures("taken_over")
def test_fp4_is_left_to_bitsandbytes() -> None:
    quantizer = auto.DiffusersAutoQuantizer.from_config(config(bnb_4bit_quant_type="fp4"))
    assert type(quantizer) is BnB4BitDiffusersQuantizer
