"""LoRA with PEFT on 4-bit experts and 4-bit embeddings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

from qlora_ext.fingerprint import fingerprint
from qlora_ext.integrations import peft as integration
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, quantize_model
from test_moe import CONFIGS, SIZES, experts_of, moe
from tiny_models import make, same_state, token_ids

IDS = token_ids()
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(model: Any, seed: int = 2, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": EXPERTS, **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    return draw(model)


def draw(model: Any, adapter: str = "default") -> Any:
    for name, p in model.named_parameters():
        if "lora_" in name and adapter in name:
            nn.init.normal_(p, std=0.2)
    return model


def dense_twin(model: Any, build: Any) -> Any:
    """The same adapters on the decoded base, computed by PEFT's code."""
    dense = build()
    dense.load_state_dict(quantize_model(build()).dequantize().state_dict())
    twin = get_peft_model(dense, copy.deepcopy(model.peft_config["default"])).eval()
    adapters = {name: t for name, t in model.state_dict().items() if "lora_" in name}
    assert any("experts" in name for name in adapters)
    assert not twin.load_state_dict(adapters, strict=False).unexpected_keys
    return twin


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def gpt_oss() -> Any:
    """Experts with transposed weights, biases, and their own gate function."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 96, "num_local_experts": 4, "head_dim": 16, "sliding_window": 8}
    return AutoModelForCausalLM.from_config(GptOssConfig(**sizes), dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "build", [*(lambda family=family: moe(family) for family in CONFIGS), gpt_oss], ids=[*CONFIGS, "gpt_oss"]
)
def test_outputs_and_gradients_are_those_of_dense_lora(build: Any) -> None:
    model = adapted(quantize_model(build()))
    assert len(experts_of(model)) == 2
    twin = dense_twin(model, build)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-3)
    for m in (model, twin):
        m(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    compared = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-2, atol=1e-5)
            compared += "experts" in name
        else:
            assert p.grad is None
    assert compared == 8  # A and B of two weights of two layers


def test_one_weight_alone() -> None:
    model = adapted(quantize_model(moe()), target_parameters=EXPERTS[:1])
    twin = dense_twin(model, moe)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-3)


def test_bfloat16_and_checkpointing_train() -> None:
    model = adapted(quantize_model(moe(dtype=torch.bfloat16))).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, again, strict=True))
    before = fingerprint(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert fingerprint(model) == before == fingerprint(quantize_model(moe(dtype=torch.bfloat16)))


def test_saves_loads_and_merges(tmp_path: Path) -> None:
    model = adapted(quantize_model(moe()))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    try:
        again = PeftModel.from_pretrained(quantize_model(moe()), tmp_path / "adapter")
    except TypeError as error:
        if "loading_info" not in str(error):
            raise
        pytest.skip(f"this PEFT cannot load adapters of experts with this transformers: {error}")
    assert torch.equal(logits(again), expected)
    assert integration.check_base(again, tmp_path / "adapter", "refuse") is True
    merged = again.merge_and_unload(safe_merge=True)
    assert experts_of(merged) == []
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), merged)
    plain = model.unload()
    assert fingerprint(plain) == fingerprint(quantize_model(moe()))


def test_merging_in_place_is_undone_to_the_bit() -> None:
    model = adapted(quantize_model(moe()))
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, expected)
    assert (merged - expected).norm() < 0.5 * expected.norm()
    model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_merge_to_4bit_reports_its_error() -> None:
    merged, error = integration.merge_to_4bit(adapted(quantize_model(moe())))
    assert len(experts_of(merged)) == 2
    names = {name for name in error.by_layer if "experts" in name}
    assert names == {f"model.layers.{i}.{weight}" for i in range(2) for weight in EXPERTS}
    assert 0.0 < min(error.by_layer.values()) <= max(error.by_layer.values()) < 0.12


def test_adapters_switch_disable_and_combine() -> None:
    plain = logits(quantize_model(moe()))
    model = adapted(quantize_model(moe()))
    first = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    try:
        model.add_adapter("second", model.peft_config["default"])
    except ValueError as error:  # PEFT 0.19
        pytest.skip(f"this PEFT has one adapter of target_parameters: {error}")
    draw(model, "second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged), both, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # an untied and a tied head
def test_lora_on_embeddings(family: str, tmp_path: Path) -> None:
    def base() -> Any:
        return quantize_model(make(family, torch.float32), embeddings=True)

    def lora(model: Any) -> Any:
        return adapted(model, target_modules=["embed_tokens", "q_proj"], target_parameters=None)

    model = lora(base())
    assert isinstance(model.base_model.model.model.embed_tokens.base_layer, Embedding4bit)
    expected = logits(model)
    assert not torch.equal(expected, logits(base()))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), expected)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    head = model.get_output_embeddings()
    if isinstance(head, Linear4bit):  # tied, so it has the table's adapter
        assert head.weight is model.base_model.model.model.embed_tokens.base_layer.weight
    model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    if family == "llama":
        merged = model.merge_and_unload()
        assert not any(isinstance(m, Embedding4bit | Experts4bit | Linear4bit) for m in merged.modules())
        torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_embeddings_reject_methods_that_read_the_table() -> None:
    model = quantize_model(make(dtype=torch.float32), embeddings=True)
    with pytest.raises(ValueError, match="a 4-bit embedding supports plain LoRA only, got use_dora=True"):
        adapted(model, target_modules=["embed_tokens"], target_parameters=None, use_dora=True)
