"""Which models share a package of compiled decoding: all whose code is the same, wherever they are stored."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_ext
import tiny_models
from qlora_app.decoding import packages


def digest(model: Any) -> str:
    return packages.digest(model, packages.causal_lm(model))


def test_a_model_has_one_digest_in_all_directories(tmp_path: pathlib.Path) -> None:
    model = tiny_models.make("llama")

    def loaded(name: str) -> Any:
        model.save_pretrained(tmp_path / name)
        copy = AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=qlora_ext.QLoRAConfig())
        return get_peft_model(copy, LoraConfig(r=4, target_modules="all-linear")).eval()

    assert digest(loaded("first")) == digest(loaded("second"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1},
        {"num_attention_heads": 8, "head_dim": 8},  # all weights keep their shapes
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"attn_implementation": "eager"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_code_has_another_digest(change: dict[str, Any]) -> None:
    def model(**options: Any) -> Any:
        attention = options.pop("attn_implementation", "sdpa")
        config = LlamaConfig(**{**tiny_models.SIZES, **options})
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    assert digest(model()) == digest(model())
    assert digest(model(**change)) != digest(model())


def test_other_activations_have_another_digest() -> None:
    model = qlora_ext.quantize_model(tiny_models.make())
    digests = []
    for name in ("exact", "int8", "exact"):
        for _, layer in qlora_ext.nn.layers_of(model):
            layer.activations = name
        digests.append(digest(model))
    assert digests[0] == digests[2] != digests[1]
