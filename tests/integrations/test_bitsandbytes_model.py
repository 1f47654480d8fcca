"""Conversion of models and adapters between bitsandbytes and qlora_ext, on random models of four families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_ext import QLoRAConfig
from qlora_ext.integrations.bitsandbytes import save_pretrained
from qlora_ext.nn import Linear4bit, layers_of, quantize_model
from tensors import error, same_bits
from tiny_models import FAMILIES, make, token_ids

IDS = token_ids()


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def theirs_config(
    double_quant: bool = True, compute_dtype: torch.dtype = torch.bfloat16, kind: str = "nf4"
) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def files(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out.float()


def exact(model: Any) -> Any:
    """Disables bitsandbytes' AVX-512 inference kernel, which ignores the compute dtype and computes in bfloat16."""
    model.eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.train()
    return model


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize(
    ("family", "double_quant", "kind"),
    [
        *((family, True, "nf4") for family in FAMILIES),
        ("llama", False, "nf4"),
        *(("llama", d, "fp4") for d in (True, False)),
    ],
)
def test_writes_the_directory_that_bitsandbytes_writes(
    family: str, double_quant: bool, kind: str, tmp_path: Path
) -> None:
    make(family).save_pretrained(tmp_path / "dense")
    config = theirs_config(double_quant, kind=kind)
    load(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", quantization_config=QLoRAConfig())
    save_pretrained(ours, tmp_path / "ours", max_shard_size="40KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1

    expected, written = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert same_bits(written, expected)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    their_config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert config == {key: their_config[key] for key in config} | {"llm_int8_skip_modules": ["lm_head"]}

    again = load(tmp_path / "ours")
    compared = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, Linear4bit):
            module = again.get_submodule(name)
            assert isinstance(module, bnb.nn.Linear4bit)
            decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert layer.form.code == kind
            assert torch.equal(decoded, layer.dequantize())
            compared += 1
    assert compared > 0
    assert error(logits(again), logits(ours)) < 0.02
    assert ours.config.quantization_config.quant_method == "qlora_ext"
    assert any("absmax" in name and "weight.absmax" not in name for name in ours.state_dict())


def test_every_linear_layer_and_any_block_size(tmp_path: Path) -> None:
    ours = quantize_model(make(), skip=["layers.0.mlp"], block_size=32)
    assert isinstance(ours.lm_head, Linear4bit)
    save_pretrained(ours, tmp_path)
    again = load(tmp_path)
    kinds = {name: isinstance(m, bnb.nn.Linear4bit) for name, m in again.named_modules()}
    assert kinds == {name: isinstance(m, Linear4bit) for name, m in ours.named_modules()}
    decoded = bnb.functional.dequantize_4bit(again.lm_head.weight.data, again.lm_head.weight.quant_state)
    assert torch.equal(decoded, ours.lm_head.dequantize())


def test_adopted_layers_have_the_activations_that_are_asked_for(tmp_path: Path) -> None:
    save_pretrained(quantize_model(make()), tmp_path)
    adopted = quantize_model(load(tmp_path), activations="int8")
    assert {layer.activations for _, layer in layers_of(adopted)} == {"int8"}


def test_only_4bit_models_are_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a transformers model with 4-bit layers"):
        save_pretrained(make(), tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens: expected 4-bit linear layers, .* got Embedding4bit"):
        save_pretrained(quantize_model(make("qwen2"), skip=[], embeddings=True), tmp_path)


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in FAMILIES), ("llama", {"use_rslora": True}), ("gpt2", {"use_dora": True})],
)
def test_adapters_go_both_ways(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    make(family, torch.float32).save_pretrained(tmp_path / "dense")
    configs = {"ours": QLoRAConfig(double_quant=False), "theirs": theirs_config(False, torch.float32)}
    expected, shapes = {}, {}
    for kind, config in configs.items():
        torch.manual_seed(len(kind))
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM",
            fan_in_fan_out=family == "gpt2", **options,
        )  # fmt: skip
        model = get_peft_model(load(tmp_path / "dense", quantization_config=config), lora)
        model.save_pretrained(tmp_path / kind)
        shapes[kind] = {name: t.shape for name, t in files(tmp_path / kind).items()}
        expected[kind] = logits(exact(model))
    assert shapes["ours"] == shapes["theirs"]
    for kind, config in configs.items():
        other = "theirs" if kind == "ours" else "ours"
        model = PeftModel.from_pretrained(load(tmp_path / "dense", quantization_config=config), tmp_path / other)
        assert error(logits(exact(model)), expected[other]) < 1e-4
        assert error(expected[kind], expected[other]) > 0.1
