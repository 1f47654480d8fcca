"""``sensitivity``: the estimated cost of 4 bits per layer is compared with the measured one; and mixed precision."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qlora_ext
from moe_families import build
from qlora_ext.calibration import calibration_of
from qlora_ext.fidelity import LayerCost, Sensitivity, allowance, compare, losses_of
from qlora_ext.nn import Experts4bit, Linear4bit, layers_of, to_be_quantized
from tiny_models import make, same_state

IDS = torch.randint(3, 128, (24, 32), generator=torch.Generator().manual_seed(1))


def decided(family: str = "llama") -> Any:
    """A model whose predictions are far from uniform, so that changing a layer changes them."""
    model = make(family, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    return model


@torch.no_grad()
def divergence(dense: Any, model: Any) -> float:
    """The KL divergence of the predictions of ``model`` from those of ``dense``, in nats per token."""
    p, q = (m(IDS).logits.double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_estimate_is_close_to_the_measured_cost() -> None:
    dense = decided()
    found = {layer.name: layer.loss for layer in qlora_ext.sensitivity(dense, IDS).layers}
    names = list(to_be_quantized(dense).values())
    assert list(found) == names
    measured = {}
    for name in names:
        alone = qlora_ext.quantize_model(copy.deepcopy(dense), keep=[other for other in names if other != name])
        assert [n for n, _ in layers_of(alone)] == [name]
        measured[name] = divergence(dense, alone)
    costly = sorted(measured, key=measured.__getitem__, reverse=True)[:6]
    assert measured[costly[0]] > 3 * measured[costly[-1]]  # the costs differ enough to be ranked
    for name in costly:
        assert 0.5 < found[name] / measured[name] < 2, (name, found[name], measured[name])
    assert sum(found.values()) == pytest.approx(sum(measured.values()), rel=0.3)


def test_the_model_is_left_as_it_is() -> None:
    model = decided()
    before = copy.deepcopy(model.state_dict())
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    found = qlora_ext.sensitivity(model, IDS[:4], seed=3)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    again = qlora_ext.sensitivity(model, IDS[:4], seed=3)
    assert again == found
    assert qlora_ext.sensitivity(model, IDS[:4], seed=4) != found


def test_a_text_of_its_own() -> None:
    seen: list[tuple[int, int]] = []
    model = decided()
    found = qlora_ext.sensitivity(model, tokens=96, length=32, progress=lambda *arguments: seen.append(arguments))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(layer.loss > 0 for layer in found.layers)


def test_bytes_are_those_of_the_quantized_model() -> None:
    model = decided()
    found = qlora_ext.sensitivity(model, IDS[:2])
    dense_layers = found.chosen("20%")
    quantized = qlora_ext.quantize_model(model, keep=[layer.name for layer in dense_layers])
    tensors = {id(t): t for t in (*quantized.parameters(), *quantized.buffers())}.values()
    assert sum(t.nbytes for t in tensors) == found.bytes + sum(layer.extra_bytes for layer in dense_layers)


def test_comparisons_on_sequences_and_on_rows_agree() -> None:
    dense = decided()
    model = qlora_ext.quantize_model(copy.deepcopy(dense))
    whole = compare(model, dense, IDS)
    rows = compare(model, losses_of(dense, [{"input_ids": IDS, "labels": IDS}]), [{"input_ids": IDS, "labels": IDS}])
    assert whole.loss == pytest.approx(model(IDS, labels=IDS).loss.item(), rel=1e-6)
    assert rows.increase.nats == pytest.approx(whole.increase.nats, abs=1e-6)
    assert whole.losses.tolist() == pytest.approx(rows.losses.view(len(IDS), -1).mean(1).tolist(), rel=1e-6)
    more = (rows.losses - rows.before).numpy()
    assert rows.increase.error == pytest.approx(more.std() / len(more) ** 0.5)
    more = (whole.losses - whole.before).numpy()
    assert whole.increase.error == pytest.approx(more.std(ddof=1) / len(more) ** 0.5)
    with pytest.raises(ValueError, match=r"reference: expected its losses on the same text, 24, got \[1\]"):
        compare(model, whole.before[:1], IDS)
    labels = IDS.masked_fill(torch.arange(32) < 20, -100)
    learnt = losses_of(dense, [{"input_ids": IDS, "labels": labels}])
    assert learnt.tolist() == rows.before.view(len(IDS), -1)[:, 19:].flatten().tolist()


def layer(name: str, loss: float, extra_bytes: int) -> LayerCost:
    return LayerCost(name, 0.1, 0.1, loss, extra_bytes)


def test_a_budget_is_spent_on_the_highest_cost_per_byte() -> None:
    layers = [layer("a", 8.0, 400), layer("b", 3.0, 100), layer("c", 1.0, 100), layer("d", 9.0, 3000), layer("h", 9, 0)]
    found = Sensitivity(layers, 10_000)
    assert found.keep(0) == []
    assert found.keep(2) == found.keep("2") == ["b", "a"]
    assert found.keep(10) == ["b", "a", "c", "d"]
    assert found.keep("5%") == ["b", "a"]
    assert found.keep("3%") == ["b", "c"]  # the next one that fits into the budget
    assert found.keep("0.0006MB") == ["b", "a", "c"]
    assert found.keep("1 MiB") == ["b", "a", "c", "d"]


@pytest.mark.parametrize("budget", ["", "many", "-1", "5.5", "5MB%", "%", "5 percent", True, 1.5, None])
def test_invalid_budgets(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget: expected a number of layers, a share"):
        allowance(budget, 1000)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ("other", ValueError, "inputs: expected 'self'"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"inputs: expected token ids \[B, T\]"),
        (torch.zeros(3, 4), TypeError, r"inputs: expected token ids \[B, T\]"),
        (None, TypeError, r"inputs: expected token ids \[B, T\]"),
    ],
)
def test_invalid_inputs(inputs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        qlora_ext.sensitivity(make(dtype=torch.float32), inputs)


def test_invalid_models() -> None:
    with pytest.raises(ValueError, match="expected one with dense layers to quantize"):
        qlora_ext.sensitivity(qlora_ext.quantize_model(make()), IDS)

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.proj = nn.Embedding(128, 64), nn.Linear(64, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.proj(self.table(ids)).sum(1)

    with pytest.raises(TypeError, match=r"expected one that maps token ids"):
        qlora_ext.sensitivity(Sums(), IDS)


def test_keep_takes_names_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"keep: expected full names of modules of the model, got 'q_proj'"):
        qlora_ext.quantize_model(make(), keep=["q_proj"])
    with pytest.raises(TypeError, match="keep: expected names of modules"):
        qlora_ext.quantize_model(make(), keep="model.layers.0.mlp.up_proj")
    with pytest.raises(TypeError, match="keep: expected names of modules"):
        qlora_ext.quantize_model(make(), keep=[1])


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("form", ["ours", "bitsandbytes"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_layers_in_keep_are_dense_in_the_saved_model(family: str, form: str, tmp_path: pathlib.Path) -> None:
    from qlora_ext.integrations.bitsandbytes import save_pretrained

    model = make(family)
    names = list(to_be_quantized(model).values())
    assert model.get_output_embeddings() not in to_be_quantized(model)  # tied or not
    dense_names = [name for name in names if ".1." in name] + names[:1]  # one full block, and a layer of another
    qlora_ext.quantize_model(model, keep=dense_names)
    assert [name for name, _ in layers_of(model)] == names[1 : len(names) - len(dense_names) + 1]
    (save_pretrained if form == "bitsandbytes" else type(model).save_pretrained)(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qlora_ext.QLoRAConfig())
    assert same_state(model, loaded)


def test_experts_in_keep_stay_dense(tmp_path: pathlib.Path) -> None:
    model = build("Qwen3-MoE")
    found = qlora_ext.sensitivity(model, IDS[:4])
    experts = [layer for layer in found.layers if layer.name.endswith(".experts")]
    assert len(experts) == 2
    assert all(layer.loss > 0 and 0 < layer.error < 0.3 and layer.extra_bytes > 0 for layer in experts)
    dense_names = ["model.layers.0.mlp.experts", "model.layers.1.self_attn.v_proj"]
    qlora_ext.quantize_model(model, keep=dense_names)
    assert not isinstance(model.get_submodule(dense_names[0]), Experts4bit)
    assert isinstance(model.get_submodule("model.layers.1.mlp.experts"), Experts4bit)
    model.save_pretrained(tmp_path)
    assert same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_layers_in_keep_are_not_calibrated() -> None:
    model = decided()
    dense_names = qlora_ext.sensitivity(model, IDS[:8]).keep(3)
    others = [name for name in to_be_quantized(model).values() if name not in dense_names]
    qlora_ext.quantize_model(model, keep=dense_names, calibration=IDS)
    assert [report.name for report in calibration_of(model)] == others
    assert all(type(model.get_submodule(name)) is nn.Linear for name in dense_names)
    assert all(isinstance(model.get_submodule(name), Linear4bit) for name in others)


class _Fixed(torch.nn.Module):
    """A model whose logits do not depend on its input."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_losses_over_a_large_vocabulary_are_exact() -> None:
    logits, ids = torch.randn(2, 65, 50_000) * 3, torch.randint(50_000, (2, 65))
    expected = -logits.double().log_softmax(2)[:, :-1].gather(2, ids[:, 1:, None]).mean((1, 2))
    torch.testing.assert_close(losses_of(_Fixed(logits), ids), expected, rtol=0, atol=1e-5)
