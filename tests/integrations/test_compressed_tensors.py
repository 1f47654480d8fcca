"""Whole models that compressed-tensors quantized: each layer decodes to its bits, and the model is saved as it was."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qlora_ext
from tensors import same_bits

INT4 = {"num_bits": 4, "type": "int"}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 with zero points": ("pack-quantized", INT4 | {"symmetric": False, "strategy": "group", "group_size": 32}),
    "int4": ("pack-quantized", INT4 | {"symmetric": True, "strategy": "group", "group_size": 128}),
    "int4 by channel": ("pack-quantized", INT4 | {"symmetric": True, "strategy": "channel"}),
    "int4 by channel, with zero points": ("pack-quantized", INT4 | {"symmetric": False, "strategy": "channel"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        FP4
        | {"strategy": "tensor_group", "group_size": 16}
        | {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn},
    ),
    "int8 in words": ("pack-quantized", INT8 | {"symmetric": False, "strategy": "group", "group_size": 32}),
    "int8 by channel": ("int-quantized", INT8 | {"symmetric": True, "strategy": "channel"}),
    "int8 by channel, with zero points": ("int-quantized", INT8 | {"symmetric": False, "strategy": "channel"}),
    "fp8": ("float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8 by channel": ("float-quantized", FP8 | {"strategy": "channel"}),
    "fp8 in tiles": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [64, 128]}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
    ),
}


def observe(layer: torch.nn.Module, args: QuantizationArgs) -> None:
    """Sets the scales and zero points of a layer by the library's own recipe."""
    w, factor = layer.weight.data, {}
    if args.strategy == "tensor_group":
        layer.weight_global_scale.data = generate_gparam(w.min(), w.max()).view_as(layer.weight_global_scale)
        factor["global_scale"] = layer.weight_global_scale.data
    rows, columns = {"tensor": w.shape, "block": (64, 128)}.get(args.strategy, (1, args.group_size or w.shape[1]))
    groups = w.view(w.shape[0] // rows, rows, -1, columns)
    found = calculate_qparams(groups.amin((1, 3)), groups.amax((1, 3)), args, **factor)
    for name, values in zip(("weight_scale", "weight_zero_point"), found, strict=True):
        if (parameter := getattr(layer, name, None)) is not None:
            parameter.data = values.to(parameter.dtype).view_as(parameter)


def write(path: pathlib.Path, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Writes a tiny quantized model, and returns the weights that the library decodes."""
    form, keywords = FORMATS[name]
    args = QuantizationArgs(**keywords)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config)
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "weight_scale")}
    for layer in layers.values():
        observe(layer, args)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    compressor.decompress_model(model)
    return {key: model.get_submodule(key).weight.detach().clone() for key in layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_of_the_library(name: str, dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    expected = write(tmp_path / "model", name, dtype)
    config = qlora_ext.QLoRAConfig()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, dtype=dtype)
    assert len(expected) == 7
    for key, w in expected.items():
        assert torch.equal(model.get_submodule(key).weight4bit.dequantize(w.dtype), w), key  # NVFP4: always bfloat16

    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("again", "model"))
    assert same_bits(ours, theirs)

    ids = torch.arange(12)[None]
    y = model(ids).logits
    model.dequantize()
    torch.testing.assert_close(
        model(ids).logits, y, rtol=0.0, atol=float(y.abs().max()) * (1e-5 if dtype == torch.float32 else 2e-2)
    )
