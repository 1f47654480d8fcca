"""bitsandbytes' FP4 weights: loaded, adopted and taken over with their bits."""

from __future__ import annotations

import pathlib
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import auto

import qlora_ext
from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, layers_of
from tiny_models import make, token_ids

IDS = token_ids()


def fp4_checkpoint(directory: pathlib.Path, **options: Any) -> pathlib.Path:
    """A model that bitsandbytes has quantized to FP4 and saved."""
    make(dtype=torch.float32).save_pretrained(directory / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32", **options)
    model = AutoModelForCausalLM.from_pretrained(
        directory / "dense", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(directory / "fp4")
    return directory / "fp4"


def load(path: pathlib.Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **options)


def decoded_by_bitsandbytes(path: pathlib.Path) -> dict[str, torch.Tensor]:
    theirs = load(path)
    return {
        name: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        for name, m in theirs.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }


def check(model: Any, expected: dict[str, torch.Tensor]) -> None:
    layers: dict[str, Any] = dict(layers_of(model))
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert layer.form.code == "fp4"
        assert torch.equal(layer.dequantize(torch.float32), expected[name])


@pytest.mark.parametrize("double_quant", [True, False])
def test_loaded_and_saved(double_quant: bool, tmp_path: pathlib.Path) -> None:
    path = fp4_checkpoint(tmp_path, bnb_4bit_use_double_quant=double_quant)
    expected = decoded_by_bitsandbytes(path)
    model = load(path, quantization_config=QLoRAConfig())
    check(model, expected)
    y = model(IDS).logits
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    check(again, expected)
    assert torch.equal(again(IDS).logits, y)
    from qlora_ext.integrations.bitsandbytes import save_pretrained

    save_pretrained(model, tmp_path / "theirs")
    found, before = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(path / "model.safetensors")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[key], t) for key, t in before.items())
    dense = model.dequantize()
    torch.testing.assert_close(dense(IDS).logits, y, rtol=1e-3, atol=1e-3)


def test_adopted(tmp_path: pathlib.Path) -> None:
    path = fp4_checkpoint(tmp_path)
    expected = decoded_by_bitsandbytes(path)
    model = load(path)
    adoption = qlora_ext.adopt(model)
    assert not adoption.left
    check(model, expected)
    model.save_pretrained(tmp_path / "saved")
    assert {**load_file(path / "model.safetensors")}.keys() == load_file(
        tmp_path / "saved" / "model.safetensors"
    ).keys()
    layer = bnb.nn.Linear4bit(64, 32, quant_type="fp4")
    assert "has not quantized yet" in qlora_ext.adopt(layer).left[""]


def test_taken_over(tmp_path: pathlib.Path) -> None:
    path = fp4_checkpoint(tmp_path)
    expected = decoded_by_bitsandbytes(path)
    before = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    from qlora_ext.integrations.bitsandbytes import take_over

    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = take_over._quantizer
    try:
        check(load(path), expected)
        config = BitsAndBytesConfig(load_in_4bit=True)
        dense = load(tmp_path / "dense", quantization_config=config)
    finally:
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = before
    assert not any(isinstance(m, Linear4bit) for m in dense.modules())  # bitsandbytes encodes FP4 itself
