"""Models in every format are saved in our layout, and load with the same bits, dtype and outputs."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qlora_ext
from qlora_ext.form import PRESETS, Form
from qlora_ext.nn import layers_of
from tiny_models import make, same_state

FORMS = {
    **PRESETS,
    "nf4 float32": Form(scales="float32"),
    "nf4 float16": Form(scales="float16"),
    "awq": Form("uint4", "float16", 32, offsets="zero_point8"),
}


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {key: t.detach().reshape(-1).view(torch.uint8) for key, t in model.state_dict().items()}


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("embeddings", [False, True], ids=["dense", "embeddings"])
def test_a_saved_model_has_the_same_bits(name: str, embeddings: bool, tmp_path: pathlib.Path) -> None:
    form = FORMS[name]
    model = make("qwen2" if embeddings else "llama")
    model = qlora_ext.quantize_model(model, embeddings=embeddings, **form.keywords)
    assert model.dtype == torch.bfloat16  # not that of the scales, which may come first
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == again.config.dtype == torch.bfloat16
    assert {layer.form for _, layer in layers_of(again)} == {form}
    before, after = bits(model), bits(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[key]) for key, t in before.items())
    dense = again.dequantize()
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert same_state(dense, model.dequantize())
