"""Merge-aware training computes with exactly the merged weights, in the base's format or a served one: in memory, with
experts, checkpointing, accumulation and saved adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import qlora_ext
from adapted_models import base, draw, made
from qlora_ext.fingerprint import fingerprint
from qlora_ext.form import Form
from qlora_ext.formats import SERVED_FORMATS
from qlora_ext.integrations import peft as integration
from qlora_ext.integrations.peft import base_file
from qlora_ext.integrations.peft.experts import LoraExperts4bit
from qlora_ext.merging import codes, merge_aware
from qlora_ext.nn import Experts4bit, Linear4bit, layers_of
from test_merging import IDS, drawn, of_ids
from tiny_models import make

every_format = pytest.mark.parametrize("code", SERVED_FORMATS)


def forms_of(model: Any) -> set[Form]:
    return {layer.form for _, layer in layers_of(model)}


def gradients(model: Any) -> list[Tensor]:
    model.train().zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the weights that were merged."""
    seeds: list[int] = []

    def counting(w4: Any, a: Tensor, b: Tensor, scaling: float, seed: int = 0) -> Any:
        seeds.append(seed)
        return codes.merged_weight(w4, a, b, scaling, seed)

    monkeypatch.setattr(merge_aware, "merged_weight", counting)
    return seeds


@every_format
def test_the_merged_model_is_the_one_that_ran(code: str) -> None:
    model = drawn(size=0.1)
    integration.set_merge_aware(model, code=code)
    assert forms_of(model) == {Form.named(code)}
    expected = of_ids(model)
    found, _ = integration.merge_to_4bit(copy.deepcopy(model))
    assert forms_of(found) == {Form.named(code)}
    assert torch.equal(of_ids(found), expected)
    model.merge_adapter()
    assert torch.equal(of_ids(model), expected)
    model.unmerge_adapter()
    assert torch.equal(of_ids(model), expected)


@every_format
def test_without_an_update_the_weights_are_those_of_the_format(code: str) -> None:
    """Each layer is what the format's recipe gives; those that servers join have one factor in NVFP4."""
    dense = {name: layer.dequantize(torch.float32) for name, layer in layers_of(drawn().unload())}
    model = drawn(target_modules=["q_proj", "k_proj"], init_lora_weights=True)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    integration.set_merge_aware(model, code=code)
    found, _ = integration.merge_to_4bit(model)
    for name, layer in layers_of(found):
        stem, _, last = name.rpartition(".")
        joined = next((group for group in ("qkv", ("gate", "up")) if last.split("_")[0] in group), (last[:-5],))
        names = [f"{stem}.{part}_proj" for part in joined] if code == "nvfp4" else [name]
        weights = [dense[part] for part in names]
        joined = torch.cat(weights)
        values = joined if code == "nf4" else qlora_ext.quantize(joined, code).dequantize()  # the base is in NF4
        expected = values.split([len(w) for w in weights])
        assert torch.equal(layer.dequantize(torch.float32), expected[names.index(name)]), name


def test_dense_layers_with_an_adapter_become_4bit() -> None:
    """Their codes do not depend on the dtype in which the model was loaded, and they compute like the other layers."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make("llama", torch.bfloat16).to(dtype)
        model = qlora_ext.quantize_model(model, skip=["lm_head", "up_proj", "o_proj"], activations="int8")
        config = {"target_modules": ["up_proj", "q_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
        expected = of_ids(model)
        integration.set_merge_aware(model, code="q4_0")
        layers = model.base_model.model.model.layers
        assert isinstance(layers[0].mlp.up_proj.base_layer, Linear4bit)
        assert type(layers[0].self_attn.o_proj) is torch.nn.Linear
        assert (of_ids(model) - expected).norm() < 0.5 * expected.norm()
        found.append(layers[1].mlp.up_proj.base_layer.weight4bit)
        assert {layer.activations for _, layer in layers_of(model)} == {"int8"}
        assert layers[1].mlp.up_proj.rounding_seed == codes.seed_of("model.layers.1.mlp.up_proj.weight")
    assert all(torch.equal(a, b) for a, b in zip(*(w4.tensors.values() for w4 in found), strict=True))


def test_rows_that_do_not_fit_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = qlora_ext.quantize_model(torch.nn.ModuleDict({"a": torch.nn.Linear(80, 48), "b": torch.nn.Linear(64, 48)}))
    model.dtype = torch.float32
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["a", "b"], init_lora_weights=False))
    a, b = model.base_model.model["a"], model.base_model.model["b"]
    x = torch.randn(3, 80)
    expected = a(x)
    integration.set_merge_aware(model, code="int4")
    assert (a.layer4bit.form.code, b.layer4bit.form.code) == ("nf4", "int4")
    assert (a.merge_aware, b.merge_aware) == (frozenset(), {"default"})
    assert torch.equal(a(x), expected)


@pytest.mark.parametrize("code", [None, "q4_0", "nvfp4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts(family: str, code: str | None) -> None:
    """Outputs are those of the merged experts, and gradients about those without rounding."""
    model = draw(made(family), std=0.05)
    plain = gradients(model)
    integration.set_merge_aware(model, code=code)
    assert {layer.form for layer in model.modules() if isinstance(layer, Experts4bit)} == {Form.named(code or "nf4")}
    found = gradients(model)
    for p, g, q in zip((p for p in model.parameters() if p.requires_grad), found, plain, strict=True):
        assert (g - q).norm() < 0.8 * q.norm(), p.shape  # other weights, but no other function of A and B
    expected = of_ids(model.eval())
    found, error = integration.merge_to_4bit(copy.deepcopy(model))
    assert torch.equal(of_ids(found), expected)
    assert 0.7 < error.retained < 1.3
    layer = next(m for m in model.modules() if isinstance(m, LoraExperts4bit))
    layer.merge()
    layer.unmerge()
    assert torch.equal(of_ids(model), expected)


@pytest.mark.parametrize("code", [None, "q4_0"])
def test_each_weight_is_encoded_once_per_optimizer_step(code: str | None, encoded: list[int]) -> None:
    """Not again for a second batch, nor when a checkpointed layer runs again in the backward."""
    model = drawn()
    integration.set_merge_aware(model, code=code)
    encoded.clear()
    first = gradients(model)
    assert len(encoded) == len(set(encoded)) == 14
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model)
    assert len(encoded) == 14
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    gradients(model)
    assert len(encoded) == 28


def test_a_merged_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    model = drawn()
    unmerged = of_ids(model)
    integration.set_merge_aware(model)
    assert not torch.equal(of_ids(model), unmerged)
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
    expected = of_ids(model.eval())
    assert torch.equal(of_ids(model), expected)  # from the saved state of the first time
    with torch.no_grad():
        trainable[0].mul_(3.0)
    assert not torch.equal(of_ids(model), expected)
    with torch.no_grad():
        trainable[0].div_(3.0)
    expected = of_ids(model)

    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(of_ids(other), expected)
    other.merge_adapter()
    assert torch.equal(of_ids(other), expected)
    other.unmerge_adapter()
    assert torch.equal(of_ids(other), expected)
    merged, error = integration.merge_to_4bit(model)
    assert torch.equal(of_ids(merged), expected)
    assert 0.8 < error.retained < 1.2


def test_writes_behind_the_back_of_torch_are_noticed(encoded: list[int]) -> None:
    """An optimizer may write to ``data``, which changes no version."""
    model = drawn()
    integration.set_merge_aware(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    before = gradients(model)
    version = layer.lora_A["default"].weight._version
    layer.lora_A["default"].weight.data.mul_(2.0)
    assert layer.lora_A["default"].weight._version == version
    after = gradients(model)
    assert len(encoded) == 15
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_saved_adapter_restores_its_format(tmp_path: Path) -> None:
    model = drawn()
    of_base = fingerprint(model)
    integration.set_merge_aware(model, code="mxfp4")
    expected = of_ids(model)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / integration.BASE_FILE).read_text())
    assert (record["merge_aware"], record["fingerprint"]) == ("mxfp4", of_base)
    other = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(of_ids(other), expected)
    assert integration.check_base(other, tmp_path) is True
    other.load_adapter(tmp_path, adapter_name="second")
    other.set_adapter("second")
    assert torch.equal(of_ids(other), expected)


@pytest.mark.parametrize(("recorded", "found"), [(True, True), (False, False), (None, False), ("nf4", "nf4")])
def test_records_of_other_versions_are_read(tmp_path: Path, recorded: Any, found: Any) -> None:
    path = tmp_path / integration.BASE_FILE
    path.write_text(json.dumps({"fingerprint": "0" * 64, "format_version": 1, "merge_aware": recorded}))
    assert base_file.recorded_merge_aware(tmp_path) == found
    path.write_text(json.dumps({"fingerprint": "0" * 64, "format_version": 1, "merge_aware": "q9"}))
    with pytest.raises(ValueError, match=r"expected merge_aware to be q4_0, .*, nf4 or true, got q9"):
        base_file.recorded_merge_aware(tmp_path)


def test_it_compiles_as_one_graph() -> None:
    model = drawn()
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
        integration.set_merge_aware(drawn(lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"adapter_name: expected plain LoRA, got 'default'"):
        integration.set_merge_aware(drawn(use_dora=True))
    with pytest.raises(ValueError, match=r"adapter_name: expected an adapter on 4-bit layers, got 'other'"):
        integration.set_merge_aware(drawn(), adapter_name="other")
    model = drawn()
    integration.set_merge_aware(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"adapters: merge-aware LoRA runs as the only active adapter"):
        of_ids(model)
    with model.disable_adapter():
        of_ids(model)


def test_invalid_formats_are_rejected() -> None:
    model = drawn()
    with pytest.raises(ValueError, match=r"code: expected q4_0, .*, got 'q5_0'"):
        integration.set_merge_aware(model, code="q5_0")
    integration.set_merge_aware(model, code="q4_0")
    with pytest.raises(
        ValueError, match=r"code: expected q4_0, the format of the base for an earlier adapter, got int4"
    ):
        integration.set_merge_aware(model, code="int4")
    head = drawn(target_modules=["lm_head", "q_proj"])
    with pytest.raises(ValueError, match=r"expected no adapter on the output head"):
        integration.set_merge_aware(head, code="q4_0")
    with pytest.raises(ValueError, match=r"lora_dropout: expected 0"):
        integration.set_merge_aware(drawn(lora_dropout=0.1), code="q4_0")


def test_it_can_be_switched_off() -> None:
    model = drawn()
    integration.set_merge_aware(model, code="q4_0")
    aware = of_ids(model)
    integration.set_merge_aware(model, False)
    plain = of_ids(model)
    assert not torch.equal(aware, plain)
    with model.disable_adapter():
        assert not torch.equal(of_ids(model), plain)
    integration.set_merge_aware(model, code="q4_0")
    assert torch.equal(of_ids(model), aware)
