"""LoRA on 4-bit layers with PEFT: one fused operator, with PEFT's adapters, files and switches."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapted_models import EXPERTS, ROWS, adapted, add_adapter, base, counting_fused_calls, loaded, made
from qlora_ext import QLoRAConfig
from qlora_ext.fingerprint import fingerprint
from qlora_ext.integrations import peft as integration
from qlora_ext.nn import Linear4bit, Packed4bit, quantize_model
from tensors import error
from tiny_models import FAMILIES, logits, make, same_state, token_ids

IDS = token_ids()
every_row = pytest.mark.parametrize("row", ROWS)


def assert_close(row: str, found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-3 if "target_parameters" in ROWS[row][1] or "embeddings" in row else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def dense_twin(row: str, model: Any) -> Any:
    """The same adapters on the decoded base, computed by PEFT's code."""
    twin = get_peft_model(base(row).dequantize(), copy.deepcopy(model.peft_config["default"])).eval()
    adapters = {name: t for name, t in model.state_dict().items() if "lora_" in name}
    assert adapters
    assert not twin.load_state_dict(adapters, strict=False).unexpected_keys
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_run_fused(family: str) -> None:
    model = adapted(base(family), fan_in_fan_out=family == "gpt2")
    layers = [m for m in model.modules() if isinstance(m, integration.LoraLinear4bit)]
    assert len(layers) == sum(isinstance(m, Linear4bit) for m in model.modules()) > 0
    with counting_fused_calls() as calls:
        model(input_ids=IDS)
    assert calls == ["fused"] * len(layers)


@pytest.mark.parametrize("fused", [True, False])
def test_lora_multiplies_the_exact_x_beside_int8_activations(fused: bool) -> None:
    """Rounded to int8, all of x that the adapter reads would be 0."""
    model = quantize_model(torch.nn.Sequential(torch.nn.Linear(128, 48)), activations="int8")
    model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    if not fused:
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    x = 0.1 * torch.randn(70, 128)
    x[:, ::64] = 100.0
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data[:, ::64] = 0.0
    with model.disable_adapter():
        without = model(x)
    with counting_fused_calls() as calls:
        torch.testing.assert_close(model(x) - without, layer.scaling["default"] * x @ a.T @ b.T, rtol=0, atol=1e-4)
    assert calls == ["fused" if fused else "plain"]


@every_row
def test_outputs_and_gradients_are_those_of_dense_lora(row: str) -> None:
    ours = made(row)
    theirs = dense_twin(row, ours)
    assert_close(row, logits(ours), logits(theirs))
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected, found = ({name: p.grad for name, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours))
    assert found.keys() == expected.keys()
    assert sum("experts" in name for name in found) == 4 * len(
        ROWS[row][1].get("target_parameters", ())
    )  # A, B; 2 layers
    for name, gradient in found.items():
        rtol = 1e-2 if "target_parameters" in ROWS[row][1] else 1e-3
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=1e-5)
    assert not any(p.grad is not None for p in ours.parameters() if not p.requires_grad)


def test_rank_and_alpha_patterns() -> None:
    model = adapted(rank_pattern={"down_proj": 2}, alpha_pattern={"up_proj": 32})
    mlp = model.base_model.model.model.layers[0].mlp
    assert mlp.down_proj.lora_A["default"].weight.shape[0] == 2
    assert mlp.up_proj.scaling["default"] == 8.0
    with counting_fused_calls() as calls:
        logits(model)
    assert set(calls) == {"fused"}


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_compute_with_either_adapter_dtype(adapter_dtype: torch.dtype) -> None:
    model = adapted(base(dtype=torch.bfloat16))
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.dtype == torch.float32  # PEFT's autocast_adapter_dtype
            p.data = p.data.to(adapter_dtype)
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == adapter_dtype and g.isfinite().all() for g in grads)


def test_dropout_is_in_the_operator_and_only_in_training() -> None:
    model = adapted(lora_dropout=0.5)
    reference = logits(model)
    assert torch.equal(logits(model), reference)
    model.train()
    with counting_fused_calls() as calls:
        torch.manual_seed(0)
        first = logits(model)
        torch.manual_seed(0)
        assert torch.equal(logits(model), first)
    assert set(calls) == {"fused"}
    assert not torch.equal(first, reference)
    assert not torch.equal(logits(model), first)


@pytest.mark.parametrize(("row", "dtype"), [("llama", torch.float32), ("mixtral", torch.bfloat16)])
def test_training_lowers_the_loss_and_leaves_the_base_alone(row: str, dtype: torch.dtype) -> None:
    model = made(row, dtype)
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for step in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 5:  # evaluation and generation in between change nothing
            model.eval()
            logits(model)
            model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False)
            model.train()
    assert losses[-1] < losses[0] - 0.2
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert fingerprint(model) == fingerprint(base(row, dtype))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = adapted(lora_dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 0
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_prepare_for_kbit_training_keeps_the_packed_state(tmp_path: Path) -> None:
    model = base("qwen2", torch.bfloat16)
    packed = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.uint8 or "absmax" in n}
    prepared = peft.prepare_model_for_kbit_training(model)
    state = prepared.state_dict()
    assert packed
    assert all(state[name].dtype == t.dtype and torch.equal(state[name], t) for name, t in packed.items())
    assert prepared.model.norm.weight.dtype == torch.float32
    assert any(getattr(m, "gradient_checkpointing", False) for m in prepared.modules())
    trained = adapted(prepared).train()
    trained(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


@every_row
def test_saves_and_loads_pefts_own_files(row: str, tmp_path: Path) -> None:
    model = made(row)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in tmp_path.iterdir()}
    again = loaded(base(row), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert integration.check_base(again, tmp_path, "refuse") is True
    if "embeddings" not in row:  # whose table is in the adapter's file
        theirs = PeftModel.from_pretrained(base(row).dequantize(), tmp_path)  # a dense base accepts the same adapter
        assert_close(row, logits(theirs), logits(model))


@pytest.mark.parametrize("row", ["llama", "mixtral"])
def test_several_adapters_switch_disable_and_combine(row: str) -> None:
    plain = logits(base(row))
    model = made(row)
    first = logits(model)
    add_adapter(model, "second", model.peft_config["default"])
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, first)
    if row == "llama":
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
        model.set_adapter("sum")
        assert_close(row, logits(model), both)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged), both, rtol=1e-3, atol=1e-3)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert fingerprint(model.unload()) == fingerprint(base(row))


@pytest.mark.parametrize("row", [row for row in ROWS if row != "tied embeddings"])
def test_merge_and_unload_gives_a_dense_model(row: str, tmp_path: Path) -> None:
    model = made(row)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, Packed4bit) for m in merged.modules())
    assert_close(row, logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert same_state(type(merged).from_pretrained(tmp_path), merged)


def test_merges_in_the_dtype_of_the_base() -> None:
    merged = adapted(base("gpt2", torch.bfloat16), fan_in_fan_out=True).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


@pytest.mark.parametrize("cast_first", [True, False])
def test_merges_in_the_dtype_to_which_the_model_was_cast(cast_first: bool) -> None:
    model = adapted(base().to(torch.float16)) if cast_first else adapted().to(torch.float16)
    expected = logits(model)
    model.merge_adapter()
    model.to(torch.bfloat16).unmerge_adapter()
    merged = model.to(torch.float16).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.float16}
    torch.testing.assert_close(logits(merged), expected, rtol=0.02, atol=0.02)


@every_row
def test_merge_adapter_in_place_is_undone_to_the_bit(row: str) -> None:
    model = made(row)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    model.merge_adapter(["default"])
    merged = logits(model)
    assert not torch.equal(merged, expected)  # the merged weights are quantized again
    if row in ("llama", "mixtral"):
        assert error(merged, expected) < 0.5
    if row == "tied embeddings":  # the head has the table's adapter
        assert model.get_output_embeddings().weight is model.get_base_model().model.embed_tokens.base_layer.weight
    if row == "llama":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)
    assert torch.equal(logits(model), expected)


def test_merging_leaves_layers_without_that_adapter_alone() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = copy.deepcopy(model.state_dict())
    model.set_adapter("second")
    model.merge_adapter()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed
    assert all(".q_proj." in name for name in changed)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(("row", "layers"), [("llama", 14), ("mixtral", 6)])
def test_merge_to_4bit_reports_its_error(row: str, layers: int) -> None:
    model = made(row)
    expected = logits(model)
    merged, found = integration.merge_to_4bit(model)
    assert {type(m) for m in merged.modules() if isinstance(m, Packed4bit)} == {
        type(m) for m in base(row).modules() if isinstance(m, Packed4bit)
    }
    assert len(found.by_layer) == layers
    weights = {f"model.layers.{i}.{weight}" for i in range(2) for weight in EXPERTS}
    assert weights & found.by_layer.keys() == (weights if row == "mixtral" else set())
    assert 0.0 < min(found.by_layer.values()) <= found.total <= max(found.by_layer.values()) < 0.12
    assert error(logits(merged), expected) < 0.5


def test_merge_to_4bit_keeps_adapters_on_dense_layers() -> None:
    model = adapted(target_modules=["q_proj", "lm_head"])
    head = model.base_model.model.lm_head
    expected = head.base_layer.weight + head.get_delta_weight("default")
    merged, error = integration.merge_to_4bit(model)
    assert len(error.by_layer) == 2
    torch.testing.assert_close(merged.lm_head.weight, expected)


def test_dora_starts_at_the_base() -> None:
    model = adapted(use_dora=True, init_lora_weights=True)
    torch.testing.assert_close(logits(model), logits(base()), rtol=1e-4, atol=1e-4)


def test_embeddings_reject_methods_that_read_the_table() -> None:
    with pytest.raises(ValueError, match="a 4-bit embedding supports plain LoRA only, got use_dora=True"):
        made("embeddings", use_dora=True)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "orthogonal"])
def test_initialisations_start_near_the_base(init: str) -> None:
    plain = logits(base())
    start = logits(adapted(init_lora_weights=init))
    exact = init in ("gaussian", "orthogonal")  # the others move a part of the base into the adapter and quantize again
    assert (start - plain).norm() <= (1e-5 if exact else 0.2) * plain.norm()


def test_a_pickled_model_is_the_same() -> None:
    model = adapted()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    assert not any(isinstance(m, Linear4bit) for m in again.merge_and_unload().modules())


def test_modules_to_save(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.grad is not None
    with torch.no_grad():
        head.weight.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


def test_fingerprint_names_the_base() -> None:
    model = base()
    print_ = fingerprint(model)
    assert len(print_) == 64
    assert fingerprint(base()) == fingerprint(base().to(torch.float16)) == fingerprint(adapted(model)) == print_
    other = base()
    other.model.layers[0].mlp.up_proj.weight.packed[0, 0] ^= 1
    assert fingerprint(other) != print_
    scales = base()
    scales.model.layers[0].mlp.up_proj.nested_offset.add_(1e-3)
    assert fingerprint(scales) != print_
    with pytest.raises(ValueError, match="found none"):
        fingerprint(make())


def test_an_adapter_knows_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted().save_pretrained(tmp_path)
    record = json.loads((tmp_path / integration.BASE_FILE).read_text())
    assert record["fingerprint"] == fingerprint(base())
    assert integration.check_base(base(), tmp_path, "refuse") is True

    other = quantize_model(make(seed=9).float())
    with pytest.warns(UserWarning, match="trained on another 4-bit base"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="trained on another 4-bit base"):
        integration.check_base(other, tmp_path, "refuse")
    assert integration.check_base(other, tmp_path, "ignore") is False
    monkeypatch.setattr(integration, "on_base_mismatch", "refuse")
    with pytest.raises(ValueError, match="trained on another 4-bit base"):
        PeftModel.from_pretrained(quantize_model(make(seed=9).float()), tmp_path)
    assert integration.check_base(make(), tmp_path) is None
    (tmp_path / integration.BASE_FILE).unlink()
    assert integration.check_base(other, tmp_path) is None


def test_a_base_is_saved_under_its_adapter(tmp_path: Path) -> None:
    """Under the names that it has without the adapter, and without the adapter's tensors."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    make("llama").save_pretrained(tmp_path / "dense")
    config = QLoRAConfig(skip_modules=[])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "plain")
    adapter = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    get_peft_model(model, adapter).get_base_model().save_pretrained(tmp_path / "adapted")
    plain, adapted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "adapted"))
    assert plain.keys() == adapted.keys()
    assert all(torch.equal(t, adapted[name]) for name, t in plain.items())
