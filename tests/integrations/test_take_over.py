"""``take_over_bitsandbytes``: unedited scripts with ``BitsAndBytesConfig`` run with qlora_ext's layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, OPTConfig, T5Config
from transformers.quantizers import auto

from qlora_ext.integrations.peft import LoraLinear4bit
from qlora_ext.nn import Linear4bit
from tensors import error
from tiny_models import FAMILIES, make, token_ids

IDS = token_ids()
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIG = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture
def taken_over() -> Iterator[None]:
    before = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    from qlora_ext.integrations.bitsandbytes import take_over

    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = take_over._quantizer
    yield
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = before


def save(directory: Path, family: str) -> Any:
    """Saves a dense model, and returns the class that loads it."""
    if family == "t5":  # its `wo` is kept in float32
        sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
        model = AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, decoder_start_token_id=0), dtype=torch.bfloat16)
    elif family == "opt":  # has projections around its layers, and an embedding tied to its head
        sizes = {"vocab_size": 128, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = make(family)
    model.save_pretrained(directory)
    return AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM


def find_all_linear_names(model: Any) -> list[str]:
    """The configuration of many scripts."""
    names = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    return sorted(names - {"lm_head"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, labels=IDS).logits
    return out.float()


def layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A model with bitsandbytes' layers, and the class that loaded it, before the take-over."""
    auto_class = save(tmp_path / "dense", request.param)
    return auto_class.from_pretrained(tmp_path / "dense", quantization_config=CONFIG), auto_class


@pytest.mark.parametrize("plain", [*FAMILIES, "opt", "t5"], indirect=True)
def test_a_script_of_bitsandbytes(
    plain: tuple[Any, Any], taken_over: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs, auto_class = plain
    capfd.readouterr()
    model = auto_class.from_pretrained(tmp_path / "dense", quantization_config=CONFIG, device_map="auto")
    count = len(layers(theirs))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("qlora_ext:")]
    assert said == [f"qlora_ext: {count} linear layers in NF4 instead of bitsandbytes'"]
    assert layers(model).keys() == layers(theirs).keys()
    assert all(isinstance(m, Linear4bit) for m in layers(model).values())
    assert model.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict() == CONFIG.to_dict()
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
    assert model.quantization_method == theirs.quantization_method
    assert model.is_loaded_in_4bit
    assert model.num_parameters() == theirs.num_parameters()
    assert find_all_linear_names(model) == find_all_linear_names(theirs)

    model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules=find_all_linear_names(model))
    model = get_peft_model(model, lora).train()
    assert sum(isinstance(m, LoraLinear4bit) for m in model.modules()) == count
    assert model.get_nb_trainable_parameters() == get_peft_model(theirs, lora).get_nb_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval().save_pretrained(tmp_path / "adapter")
    base = auto_class.from_pretrained(tmp_path / "dense", quantization_config=CONFIG, device_map={"": "cpu"})
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (
        error(logits(again), logits(model)) < 0.02
    )  # the preparation for k-bit training had cast the norms to float32
    merged = again.merge_and_unload()
    assert not layers(merged)
    assert error(logits(merged), logits(model)) < 0.03
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(auto_class.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("plain", ["llama", "gpt2"], indirect=True)
def test_saved_models_are_in_bitsandbytes_format(plain: tuple[Any, Any], tmp_path: Path, request: Any) -> None:
    theirs, auto_class = plain
    request.getfixturevalue("taken_over")
    model = auto_class.from_pretrained(tmp_path / "dense", quantization_config=CONFIG)
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("ours", "theirs")]
    assert configs[0] == configs[1]

    for kind in ("ours", "theirs"):  # loads without a given configuration, because the model has one
        again = auto_class.from_pretrained(tmp_path / kind)
        assert all(isinstance(m, Linear4bit) for m in layers(again).values())
        for name, layer in layers(again).items():
            torch.testing.assert_close(layer.dequantize(), layers(model)[name].dequantize(), rtol=2e-2, atol=1e-6)
        again.save_pretrained(tmp_path / "twice")
        twice, once = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("twice", kind))
        assert twice == once


def test_a_directory_saved_while_taken_over_loads_into_plain_bitsandbytes(tmp_path: Path, request: Any) -> None:
    save(tmp_path / "dense", "qwen2")
    before = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    request.getfixturevalue("taken_over")
    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "4bit")
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = before
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    assert layers(plain).keys() == layers(model).keys()
    for name, layer in layers(plain).items():
        assert type(layer) is bnb.nn.Linear4bit
        assert layer.weight.dtype == torch.bfloat16  # the requested storage dtype
        decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(decoded, layers(model)[name].dequantize())


def test_fp4_and_int8_are_not_encoded(taken_over: None, tmp_path: Path) -> None:
    """But checkpoints in FP4 are taken over."""
    save(tmp_path, "llama")
    fp4 = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert {type(m) for m in layers(fp4).values()} == {bnb.nn.Linear4bit}
    fp4.save_pretrained(tmp_path / "fp4")
    ours = layers(AutoModelForCausalLM.from_pretrained(tmp_path / "fp4"))
    for name, layer in layers(fp4).items():
        decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert isinstance(ours[name], Linear4bit)
        assert torch.equal(ours[name].dequantize(), decoded)
    int8 = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert any(isinstance(m, bnb.nn.Linear8bitLt) for m in int8.modules())


def test_modules_to_skip_are_those_that_bitsandbytes_skips(taken_over: None, tmp_path: Path) -> None:
    save(tmp_path / "dense", "llama")
    skip = ["lm_head", "up_proj", "layers.0"]
    config = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    # "layers.0" is neither a prefix nor a suffix of a name.
    assert {name.split(".")[-1] for name in layers(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj",
    }  # fmt: skip
    assert config.llm_int8_skip_modules == skip
    model.save_pretrained(tmp_path / "4bit")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    assert layers(again).keys() == layers(model).keys()
    assert model.model.layers[0].mlp.down_proj.compute_dtype == torch.float32  # BitsAndBytesConfig's own default


def test_sequence_classification_keeps_its_head(taken_over: None, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    save(tmp_path, "llama")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, quantization_config=CONFIG)
    assert type(model.score) is torch.nn.Linear
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=find_all_linear_names(model)))
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert model.base_model.model.score.modules_to_save["default"].weight.grad is not None
