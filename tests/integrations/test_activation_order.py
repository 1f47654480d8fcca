"""GPTQ checkpoints in activation order: the permutation belongs to the layer, and everything works with it."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import packed_models
from packed_models import IDS, change, load, same_tensors
from qlora_ext.integrations.peft import merge_to_4bit, set_merge_aware
from qlora_ext.integrations.transformers import save_in_our_format
from qlora_ext.nn import Experts4bit, layers_of
from tiny_models import same_state

ORDER = ("llama", "gptq-order")


def adapted(model: torch.nn.Module, std: float) -> torch.nn.Module:
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(2)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(p, std=std)
    return model.eval()


def test_layers_whose_groups_are_in_order_have_no_permutation(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *ORDER)
    change(checkpoint, "model.layers.0.mlp.up_proj.g_idx", lambda t: t.sort().values)
    model = load(checkpoint.path)
    plain = [name for name, layer in layers_of(model) if not layer.form.reordered]
    assert plain == ["model.layers.0.mlp.up_proj"]


def test_streaming_gives_the_same_gradients(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *ORDER)
    gradients = []
    for model in (load(checkpoint.path), load(checkpoint.path, stream="ram")):
        model = adapted(model, 0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def test_our_format_has_the_order(tmp_path: pathlib.Path) -> None:
    model = load(packed_models.save(tmp_path, *ORDER).path)
    save_in_our_format(model)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, device_map="cpu")
    assert same_state(again, model)
    assert torch.equal(load(tmp_path / "ours", stream="disk")(IDS).logits, model(IDS).logits)


def test_merging(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *ORDER)
    model = adapted(load(checkpoint.path), 0.01)
    y = model(IDS).logits
    model.merge_adapter()
    assert not torch.equal(model(IDS).logits, y)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, y)
    dense = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(dense(IDS).logits, y, rtol=1e-4, atol=1e-4)
    merged, error = merge_to_4bit(model)
    assert 0.8 < error.retained < 1.2
    merged.save_pretrained(tmp_path / "merged")
    assert same_state(load(tmp_path / "merged"), merged)


def test_merge_aware_training_runs_with_the_merged_weight(tmp_path: pathlib.Path) -> None:
    model = adapted(load(packed_models.save(tmp_path, *ORDER).path), 0.1)
    set_merge_aware(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    y = model(IDS).logits
    merged, _ = merge_to_4bit(model)
    assert torch.equal(merged(IDS).logits, y)


def test_another_order_is_not_saved(tmp_path: pathlib.Path) -> None:
    model = load(packed_models.save(tmp_path, *ORDER).path)
    layer = model.model.layers[0].mlp.up_proj
    layer.set_weight(layer.weight.replace(column_order=layer.column_order.flip(0)))
    with pytest.raises(ValueError, match=r"up_proj\.weight: expected the columns in the order of the checkpoint's"):
        model.save_pretrained(tmp_path / "saved")


def test_experts_are_rejected(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "qwen3_moe", "gptq-order")
    with pytest.raises(
        ValueError, match=r"experts\.0\.down_proj\.weight: expected .* got an activation order \(desc_act\)"
    ):
        load(checkpoint.path)
    for name in [name for name in checkpoint.tensors if ".experts." in name and name.endswith("g_idx")]:
        checkpoint.tensors[name] = checkpoint.tensors[name].sort().values
    change(checkpoint, "", lambda t: None)
    model = load(checkpoint.path)
    assert {layer.form.reordered for _, layer in layers_of(model)} == {False, True}
    assert any(isinstance(layer, Experts4bit) for _, layer in layers_of(model))
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", checkpoint.tensors)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["quantization_config"]["desc_act"]
