"""Checkpoints in 4-bit formats keep their bits in a model, and are saved as they were."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import packed_models
from packed_models import FORMATS, IDS, Checkpoint
from qlora_ext import QLoRAConfig
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, layers_of

CASES = [
    *(("llama", kind) for kind in FORMATS),
    *(("qwen3_moe", kind) for kind in FORMATS),
    ("mixtral", "nvfp4-pack-quantized"),
    ("mixtral", "pack-quantized"),
    ("gpt_oss", "mxfp4"),
]


def load(path: pathlib.Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=QLoRAConfig(**options), device_map="cpu"
    )


def decoded(model: Any) -> dict[str, torch.Tensor]:
    """The values of all 4-bit weights, in the layout of dense modules."""
    found = {}
    for name, layer in layers_of(model):
        for weight in layer.packed_shapes:
            values = layer.dequantize(weight, torch.float32) if isinstance(layer, Experts4bit) else layer.dequantize(torch.float32)
            found[f"{name}.{weight}"] = values
    return found


def same_tensors(path: pathlib.Path, expected: dict[str, torch.Tensor]) -> bool:
    found = load_file(path / "model.safetensors")
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    bits = torch.uint8
    return all(
        t.dtype == found[name].dtype and t.shape == found[name].shape
        and torch.equal(t.contiguous().reshape(-1).view(bits), found[name].reshape(-1).view(bits))
        for name, t in expected.items()
    )


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_weights_are_the_files(family: str, kind: str, tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, family, kind)
    model = load(checkpoint.path)
    state = checkpoint.dense.state_dict()
    values = decoded(model)
    assert values and not any(isinstance(m, Embedding4bit) for m in model.modules())
    for name, found in values.items():
        assert torch.equal(found, state[name]), name
    packed = {name for name in values}
    for name, t in model.state_dict().items():
        if name in state and name not in packed:
            assert torch.equal(t, state[name]), name
    y, expected = model(IDS).logits, checkpoint.dense(IDS).logits
    torch.testing.assert_close(y, expected, rtol=2e-4, atol=2e-4)

    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", checkpoint.tensors)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"] == checkpoint.config
    again = load(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, y)

    dense = model.dequantize()
    assert not any(True for _ in layers_of(dense))
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=2e-4, atol=2e-4)
