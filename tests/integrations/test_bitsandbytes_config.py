"""Arguments of ``BitsAndBytesConfig`` given to ``QLoRAConfig`` are mapped, or rejected by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, layers_of
from tiny_models import make


def test_the_arguments_of_the_other_class_are_understood() -> None:
    config = QLoRAConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype="float16",
        bnb_4bit_quant_storage=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "q_proj"],
        llm_int8_threshold=6.0,
        llm_int8_has_fp16_weight=False,
    )
    assert (
        config.to_dict()
        == QLoRAConfig(double_quant=False, compute_dtype=torch.float16, skip_modules=["lm_head", "q_proj"]).to_dict()
    )
    assert QLoRAConfig(load_in_4bit=True).to_dict() == QLoRAConfig().to_dict()
    all_of_it = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    assert QLoRAConfig(**all_of_it).compute_dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_8bit": True}, r"load_in_8bit: expected False, got True: LLM.int8\(\) is not supported"),
        ({"load_in_4bit": False}, "load_in_4bit: expected True, got False"),
        (
            {"bnb_4bit_quant_type": "fp4"},
            "bnb_4bit_quant_type: expected 'nf4', got 'fp4': only NF4 is supported",
        ),
        ({"llm_int8_enable_fp32_cpu_offload": True}, "llm_int8_enable_fp32_cpu_offload: .* in skip_modules"),
        ({"bnb_4bit_quant_storage": "four bytes"}, "bnb_4bit_quant_storage: expected a torch dtype"),
        ({"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype: expected a floating-point torch dtype"),
        ({"bnb_4bit_use_double_quant": 1}, "double_quant: expected True or False"),
        ({"llm_int8_skip_modules": "lm_head"}, "skip_modules: expected a list of names"),
    ],
)
def test_unsupported_arguments_are_rejected_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QLoRAConfig(**arguments)
    with pytest.raises(TypeError, match="no argument 'bnb_4bit_colour'"):
        QLoRAConfig(bnb_4bit_colour="red")


def test_unsupported_arguments_cannot_be_assigned() -> None:
    config = QLoRAConfig()
    for name, value in (("load_in_8bit", True), ("load_in_4bit", False), ("bnb_4bit_quant_type", "fp4")):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
            setattr(config, name, value)
    config.load_in_8bit, config.llm_int8_skip_modules = False, ["lm_head"]
    assert config.to_dict() == QLoRAConfig(skip_modules=["lm_head"]).to_dict()


def test_misspelt_arguments_get_a_suggestion() -> None:
    for typed, meant in (
        ("blocksize", "block_size"),
        ("Double_Quant", "double_quant"),
        ("skip_module", "skip_modules"),
    ):
        with pytest.raises(TypeError, match=f"no argument '{typed}'; did you mean {meant}\\?"):
            QLoRAConfig(**{typed: 1})
    for name in ("bf16", "fp16", "fp32"):
        assert QLoRAConfig(compute_dtype=name).compute_dtype.is_floating_point
    with pytest.raises(ValueError, match=r"compute_dtype: .*bfloat16, float16, float32\), got 'bf17'"):
        QLoRAConfig(compute_dtype="bf17")


def test_the_class_is_no_configuration(tmp_path: Path) -> None:
    """The class instead of an instance."""
    make().save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match=r"write QLoRAConfig\(\) with parentheses"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QLoRAConfig)
    assert not hasattr(QLoRAConfig, "quant_method")
    assert QLoRAConfig().quant_method == "qlora_ext"


@pytest.mark.parametrize("as_dict", [False, True])
def test_from_bitsandbytes_quantizes_a_dense_checkpoint(as_dict: bool, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "dense")
    given = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="float16",
        bnb_4bit_quant_storage="bfloat16",
        llm_int8_skip_modules=["lm_head", "k_proj"],
    )
    config = QLoRAConfig.from_bitsandbytes(given.to_dict() if as_dict else given)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    layers = dict(layers_of(model))
    assert len(layers) == 12
    assert all(isinstance(m, Linear4bit) and m.compute_dtype == torch.float16 for m in layers.values())
    assert not any(m.double_quant for m in layers.values())
    assert not any("k_proj" in name for name in layers)
    model.save_pretrained(tmp_path / "4bit")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "4bit").config.quantization_config.quant_method == "qlora_ext"
    )


def test_from_bitsandbytes_rejects_other_formats() -> None:
    for arguments, kind in (({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True}, "FP4")):
        with pytest.raises(ValueError, match=f"NF4 checkpoint, got {kind}"):
            QLoRAConfig.from_bitsandbytes(BitsAndBytesConfig(**arguments))
    with pytest.raises(ValueError, match="load_in_4bit=True, got one that quantizes nothing"):
        QLoRAConfig.from_bitsandbytes(BitsAndBytesConfig())
    for other in (None, "nf4", QLoRAConfig(), {"quant_method": "gptq"}):
        with pytest.raises(TypeError, match="config: expected a BitsAndBytesConfig or its fields"):
            QLoRAConfig.from_bitsandbytes(other)
