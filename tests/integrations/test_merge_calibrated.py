"""Calibrated merging retains an adapter's update even if each weight changes by less than a step between codes."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers

import qlora_ext
from qlora_ext import integrations
from qlora_ext.calibration import Calibration, calibration_of
from qlora_ext.nn import Linear4bit, layers_of

IDS = torch.arange(8 * 32).reshape(8, 32) * 7 % 61


def base(**more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, **more
    )
    torch.manual_seed(0)
    return qlora_ext.quantize_model(transformers.LlamaForCausalLM(config))


def adapted(size: float = 0.004, mixed: bool = False, **config: Any) -> Any:
    """A model with an adapter that changes no weight enough for a different code."""
    lora = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, **config)
    model = peft.get_peft_model(base(), lora, mixed=mixed)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=size**0.5)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_it_retains_the_update_that_rounding_loses() -> None:
    model = adapted(target_modules="all-linear")
    learnt = logits(model)
    with model.disable_adapter():
        without = logits(model)
    rounded, _ = integrations.peft.merge_to_4bit(copy.deepcopy(model))
    merged = integrations.peft.merge_calibrated(model, Calibration(IDS))
    plain, calibrated = ((logits(m) - learnt).norm() / (without - learnt).norm() for m in (rounded, merged))
    assert calibrated < 0.6 * plain, (calibrated, plain)
    assert {r.method for r in calibration_of(merged)} == {"feedback"}
    assert all(isinstance(m, Linear4bit) for n, m in merged.named_modules() if n.endswith("_proj"))


def test_layers_without_an_adapter_keep_their_bits() -> None:
    model = adapted(target_modules=["up_proj"])
    before = {name: layer.weight.clone() for name, layer in layers_of(model.get_base_model())}
    form = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj").form
    merged = integrations.peft.merge_calibrated(model, Calibration(IDS))
    changed = set()
    for name, layer in layers_of(merged):
        assert layer.form == form
        old = before.get(name, before.get(f"{name}.base_layer"))
        if not torch.equal(layer.weight, old):
            changed.add(name.rpartition(".")[2])
    assert changed == {"up_proj"}
    assert [r.name for r in calibration_of(merged)] == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]


def test_mixed_models_merge_like_others() -> None:
    models = (adapted(mixed=mixed, target_modules=["up_proj"]) for mixed in (False, True))
    one, other = (integrations.peft.merge_calibrated(model, Calibration(IDS)) for model in models)
    assert torch.equal(logits(one), logits(other))


def test_experts_are_merged_one_by_one() -> None:
    from moe_families import adapted as adapted_moe

    model = adapted_moe("Mixtral").eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(2))
    merged = integrations.peft.merge_calibrated(model, Calibration(ids))
    report = {r.name.rpartition(".")[2]: r for r in calibration_of(merged)}
    assert {"gate_up_proj", "down_proj"} <= report.keys()
    assert all(r.error < r.absmax_error for r in report.values())


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="model: expected an active adapter on a 4-bit layer, found none"):
        integrations.peft.merge_calibrated(adapted(target_modules=["lm_head"]), Calibration(IDS))
