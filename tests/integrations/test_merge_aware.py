"""Merging into 4 bits retains an adapter's update. Merge-aware training computes with exactly the merged weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import qlora_ext
from qlora_ext.integrations import peft as integration
from qlora_ext.integrations.peft.experts import LoraExperts4bit
from qlora_ext.merged_linear import merged_linear_nf4
from qlora_ext.merging.codes import merged_weight, retained_update, seed_of, with_update
from qlora_ext.nn import layers_of
from samples import layer_and_adapter
from tiny_models import make, token_ids

IDS = token_ids(4, 24)


def adapted(size: float = 0.03, **config: Any) -> Any:
    """Adapters that change each weight by less than half the distance between two codes."""
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False, **config}
    model = peft.get_peft_model(
        qlora_ext.quantize_model(make("llama", torch.float32)), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    )
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=size)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("double_quant", [True, False])
def test_codes_hold_the_update(double_quant: bool) -> None:
    w4, a, b = layer_and_adapter(double_quant)
    update = 2.0 * (b @ a)
    w = w4.dequantize(torch.float32)
    nearest = torch.ops.qlora.encode_nf4(w + update, w4.decoded_scales(), 64)
    assert torch.equal(nearest, w4.packed)  # rounding each weight separately would lose it
    merged = merged_weight(w4, a, b, 2.0)
    assert merged.tensors.keys() == w4.tensors.keys()
    assert all(torch.equal(merged.tensors[key], w4.tensors[key]) for key in w4.tensors if key != "packed")
    stepped = merged.dequantize(torch.float32) - w
    retained = ((stepped * update).sum() / update.square().sum()).item()
    assert 0.8 < retained < 1.2
    assert torch.equal(merged_weight(w4, a, b, 2.0).packed, merged.packed)
    assert torch.equal(merged_weight(w4, a, torch.zeros_like(b), 2.0).packed, w4.packed)


def test_stacks_are_rounded_matrix_by_matrix() -> None:
    parts = [qlora_ext.quantize_nf4(torch.randn(8, 40)) for _ in range(3)]
    stack = qlora_ext.NF4Weight.stack(parts)
    moved = torch.stack([part.dequantize(torch.float32) for part in parts]) + 0.01 * torch.randn(3, 8, 40)
    merged = with_update(stack, moved, 5)
    for e, part in enumerate(parts):
        assert torch.equal(merged.matrix(e).packed, with_update(part, moved[e], seed_of(f"5.{e}")).packed)


def correlation(errors: list[Tensor]) -> float:
    """The largest correlation between two of them, each with 20,000 or more entries."""
    found = torch.corrcoef(torch.stack([e.flatten() for e in errors]))
    return (found - torch.eye(len(errors))).abs().max().item()


def test_rounding_errors_of_layers_and_experts_are_independent() -> None:
    model = peft.get_peft_model(
        qlora_ext.quantize_model(torch.nn.ModuleDict({name: torch.nn.Linear(256, 80) for name in ("q", "k", "v")})),
        peft.LoraConfig(target_modules=["q", "k", "v"], init_lora_weights=False, r=4),
    )
    layers = [m for m in model.modules() if isinstance(m, integration.LoraLinear4bit)]
    errors = []
    for layer in layers:
        torch.nn.init.normal_(layer.lora_A["default"].weight, std=0.01)
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
        exact = layer.decoded() + layer.get_delta_weight("default")
        layer.merge()
        errors.append(layer.decoded() - exact)
        layer.unmerge()
    assert correlation(errors) < 0.05
    w4 = qlora_ext.quantize_nf4(torch.randn(80, 256))
    exact = torch.stack([w4.dequantize(torch.float32) + 0.01 * torch.randn(80, 256) for _ in range(3)])
    merged = with_update(qlora_ext.NF4Weight.stack([w4] * 3), exact)
    errors = [merged.matrix(e).dequantize(torch.float32) - exact[e] for e in range(3)]
    assert correlation(errors) < 0.05


def test_the_name_of_a_layer_rounds_it_whoever_merges(tmp_path: Path) -> None:
    model = adapted()
    seeds = {n: m.rounding_seed for n, m in model.named_modules() if isinstance(m, integration.LoraLinear4bit)}
    assert len({*seeds.values()}) == len(seeds) == 14
    for name, seed in seeds.items():
        assert seed == seed_of(f"{name.removeprefix('base_model.model.')}.weight")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(qlora_ext.quantize_model(make("llama", torch.float32)), tmp_path)
    again.load_adapter(tmp_path, adapter_name="second")
    assert seeds == {n: m.rounding_seed for n, m in again.named_modules() if isinstance(m, integration.LoraLinear4bit)}
    model.merge_adapter()
    merged, _ = integration.merge_to_4bit(again)
    expected = {n.removeprefix("base_model.model.").replace(".base_layer", ""): m for n, m in layers_of(model)}
    for name, layer in layers_of(merged):
        assert torch.equal(layer.weight, expected[name].weight)  # type: ignore[arg-type]


def test_adapters_on_copies_of_a_layer_merge_and_unmerge_by_themselves() -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "layer_replication": [(0, 2), (0, 2)]}
    model = adapted(size=0.3, **options)
    state = {name: [*layer.packed_state().values()] for name, layer in layers_of(model)}
    bits = {name: [t.clone() for t in tensors] for name, tensors in state.items()}
    assert len({t[0].data_ptr() for t in state.values()}) < len(state)
    expected = logits(model)
    layers = [m for m in model.modules() if isinstance(m, integration.LoraLinear4bit)]
    for order in (layers, layers[::-1], layers[1::2] + layers[::2]):
        model.merge_adapter()
        model.merge_adapter()
        merged = logits(model)
        assert (merged - expected).norm() < 0.2 * expected.norm()  # each copy has only its own adapter
        for layer in order:
            layer.unmerge()
        for name, layer in layers_of(model):
            for t, same, before in zip(layer.packed_state().values(), state[name], bits[name], strict=True):
                assert t is same
                assert torch.equal(t, before)
        assert torch.equal(logits(model), expected)
    base, _ = integration.merge_to_4bit(model)
    assert torch.equal(logits(base), merged)


@pytest.mark.parametrize("order", [("default", "second"), ("second", "default")])
def test_two_adapters_leave_the_bits_that_they_found(order: tuple[str, str]) -> None:
    model = adapted()
    bits = {name: layer.weight.packed.clone() for name, layer in layers_of(model)}
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    for names in ([order[0]], [order[1]], [*order]):
        model.merge_adapter(names)
    model.unmerge_adapter()
    for name, layer in layers_of(model):
        assert torch.equal(layer.weight.packed, bits[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_the_rounding(dtype: torch.dtype) -> None:
    w4, a, b = layer_and_adapter()
    x, bias, dy = torch.randn(7, 128).to(dtype), torch.randn(96).to(dtype), torch.randn(7, 96).to(dtype)
    merged = merged_weight(w4, a, b, 2.0)
    leaves = [t.to(dtype).requires_grad_() for t in (x, bias, a, b)]
    y = merged_linear_nf4(leaves[0], merged, *leaves[1:], 2.0)
    assert torch.equal(y, qlora_ext.linear_nf4(x, merged, bias))
    y.backward(dy)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    w = merged.dequantize(torch.float32).double()
    update = 2.0 * exact[3] @ exact[2]
    (exact[0] @ (w + update - update.detach()).T + exact[1]).backward(dy.double())
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        error = (leaf.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_merged_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    model = adapted()
    unmerged = logits(model)
    integration.set_merge_aware(model)
    assert not torch.equal(logits(model), unmerged)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits(model.eval())
    assert torch.equal(logits(model), expected)  # from the saved state of the first time
    with torch.no_grad():
        trainable[0].mul_(3.0)
    assert not torch.equal(logits(model), expected)
    with torch.no_grad():
        trainable[0].div_(3.0)
    expected = logits(model)

    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(qlora_ext.quantize_model(make("llama", torch.float32)), tmp_path).eval()
    assert torch.equal(logits(other), expected)
    other.merge_adapter()
    assert torch.equal(logits(other), expected)
    other.unmerge_adapter()
    assert torch.equal(logits(other), expected)
    merged, error = integration.merge_to_4bit(model)
    assert torch.equal(logits(merged), expected)
    assert 0.8 < error.retained < 1.2


def test_checkpointing_and_accumulation_give_the_same_gradients() -> None:
    model = adapted()
    integration.set_merge_aware(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_outputs_change_by_the_update() -> None:
    """On average over many inputs. With rounding to the nearest codes, they would hardly change."""
    w4 = qlora_ext.quantize_nf4(torch.randn(64, 1024))
    x = torch.randn(256, 1024) + 1.0  # with a nonzero mean, like activations
    a, b = torch.full((1, 1024), 0.01), torch.ones(64, 1)
    w = w4.dequantize(torch.float32)
    expected = (x @ (b @ a).T).mean()
    moved = {
        "nearest": qlora_ext.quantize_nf4(w + b @ a).dequantize(torch.float32),
        "merged": merged_weight(w4, a, b, 1.0).dequantize(torch.float32),
    }
    share = {name: ((x @ (after - w).T).mean() / expected).item() for name, after in moved.items()}
    assert abs(share["merged"] - 1.0) < 0.15
    assert abs(share["nearest"]) < 0.4, share


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_the_codes_of_small_and_of_large_updates(size: float) -> None:
    """Small updates are rounded stochastically under the old scales, large ones to the nearest under new scales."""
    model = adapted(size=size)
    scales = [layer.absmax.clone() for _, layer in layers_of(model)]
    merged, error = integration.merge_to_4bit(model)
    after = [layer.absmax for _, layer in layers_of(merged)]
    assert len(scales) > 0
    assert all(torch.equal(a, b) for a, b in zip(scales, after, strict=True)) == (size < 1.0)
    assert 0.9 < error.retained < 1.1
    assert error.total < 0.12


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_small_updates_of_experts_are_retained(family: str) -> None:
    """GPT-OSS stores its experts transposed relative to the quantized layout."""
    from test_moe import moe
    from test_peft_experts import adapted as adapted_experts
    from test_peft_experts import gpt_oss

    dense = gpt_oss() if family == "gpt_oss" else moe(family)
    model = adapted_experts(qlora_ext.quantize_model(dense))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.02)
    layer = next(m for m in model.modules() if isinstance(m, LoraExperts4bit))
    before, scales = layer.decoded(), layer.layer4bit.packed_weight(layer.parameter_name).absmax.clone()
    update = layer.get_delta_weight("default")
    layer.merge()
    assert torch.equal(layer.layer4bit.packed_weight(layer.parameter_name).absmax, scales)
    stepped = layer.decoded() - before
    largest = before.abs().amax() * 0.31  # the widest step of the code
    assert stepped.abs().amax() <= largest
    retained, total = retained_update(update, before, layer.decoded())
    assert 0.7 < retained / total < 1.3
    layer.unmerge()
    assert torch.equal(layer.decoded(), before)


def test_retained_is_a_share_of_the_update() -> None:
    before, update = torch.randn(8, 8), torch.randn(8, 8)
    for share in (0.0, 0.5, 1.0):
        retained, total = retained_update(update, before, before + share * update)
        assert retained / total == pytest.approx(share, abs=1e-5)


def test_it_compiles_as_one_graph() -> None:
    import torch._dynamo

    model = adapted()
    integration.set_merge_aware(model)
    found = []
    for compiled in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        compiled.train()(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch._dynamo.explain(model.eval())(input_ids=IDS).graph_count == 1


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"lora_dropout: expected 0, because a merged adapter has no dropout, got 0.1"):
        integration.set_merge_aware(adapted(lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"adapter_name: expected plain LoRA, got 'default'"):
        integration.set_merge_aware(adapted(use_dora=True))
    with pytest.raises(ValueError, match=r"adapter_name: expected an adapter on 4-bit layers, got 'other'"):
        integration.set_merge_aware(adapted(), adapter_name="other")
    model = adapted()
    integration.set_merge_aware(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"adapters: merge-aware LoRA runs as the only active adapter"):
        logits(model)
    with model.disable_adapter():
        logits(model)


def test_the_report_of_merging_is_complete() -> None:
    _, error = integration.merge_to_4bit(adapted())
    assert {field.name for field in dataclasses.fields(error)} == {"by_layer", "total", "retained"}
    assert len(error.by_layer) == 14
