"""Adapters merge into weights of every form: scales and offsets stay, codes hold the update, and unmerging is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed")

import qlora_ext
from forms import FORMS, random_weight
from qlora_ext.formats import code_values
from qlora_ext.integrations import peft as integration
from qlora_ext.merged_linear import merged_linear_nf4
from qlora_ext.merging.codes import encode_like, merged_weight, with_nearest_codes, with_update
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, layers_of
from qlora_ext.weight import Weight4bit
from tiny_experts import Experts, routing

EVERY = pytest.mark.parametrize("name", FORMS)
SHAPE = (96, 160)


def same_but_codes(a: Weight4bit, b: Weight4bit) -> bool:
    return a.form == b.form and all(torch.equal(t, b.tensors[key]) for key, t in a.tensors.items() if key != "packed")


def decoded(w4: Weight4bit) -> torch.Tensor:
    if len(w4.shape) == 2:
        return w4.dequantize()
    return torch.stack([w4.matrix(e).dequantize() for e in range(len(w4.packed))])


def small_update(w4: Weight4bit, factor: float = 0.04) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter of rank 8 whose update is far smaller than the distance of neighbouring codes."""
    values = torch.tensor(code_values(w4.code)).unique()
    step = w4.decoded_scales().abs().mean() * values.diff().mean()
    return torch.randn(8, w4.shape[1]) / 8**0.5, factor * step * torch.randn(w4.shape[0], 8)


@EVERY
def test_codes_hold_an_update_below_their_distance(name: str) -> None:
    w4 = random_weight(FORMS[name], SHAPE)
    a, b = small_update(w4)
    update, w = 2.0 * (b @ a), w4.dequantize()
    assert torch.equal(with_update(w4, w).dequantize(), w)  # nothing moves without an update
    merged = merged_weight(w4, a, b, 2.0)
    assert same_but_codes(merged, w4)
    inside = (w4.dequantize() + update).abs() <= w.abs().max()
    stepped = merged.dequantize() - w
    retained = ((stepped * update)[inside].sum() / update[inside].square().sum()).item()
    assert 0.75 < retained < 1.25
    nearest = with_nearest_codes(w4, w + update).dequantize() - w
    assert ((nearest * update).sum() / update.square().sum()).item() < 0.2


@EVERY
def test_a_weight_on_its_codes_is_rounded_stochastically(name: str) -> None:
    w4 = random_weight(FORMS[name], SHAPE)
    a, b = small_update(w4)
    before = w4.dequantize(torch.float32)
    moved = before + 2.0 * (b @ a)
    found = encode_like(w4, before, moved, seed=7)
    assert same_but_codes(found.w4, w4)
    assert torch.equal(found.w4.packed, with_update(w4, moved, 7).packed)
    assert found.total == pytest.approx((moved - before).square().sum().item())


@pytest.mark.parametrize("size", [0.002, 0.02])
@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4", "q4_0", "q4_1", "iq4_nl"])
def test_a_weight_of_another_format_keeps_its_update(name: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = qlora_ext.quantize_nf4(torch.randn(512, 512, generator=generator)).dequantize()
    update = size * torch.randn(512, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    base = qlora_ext.quantize(w, name)
    found = encode_like(base, w, w + update)
    assert 0.85 < found.retained / found.total < 1.15
    error, unavoidable = ((w4 - w).norm() for w4 in (found.w4.dequantize() - update, base.dequantize()))
    assert error < 1.15 * unavoidable


@EVERY
def test_the_nearest_codes_of_its_own_values_give_them_again(name: str) -> None:
    for shape in (SHAPE, (3, 32, 80)):
        w4 = random_weight(FORMS[name], shape)
        w = decoded(w4)
        again = with_nearest_codes(w4, w)
        assert same_but_codes(again, w4)
        assert torch.equal(decoded(again), w)
        assert torch.equal(with_update(w4, w, seed=3).packed, again.packed)


@EVERY
def test_a_merge_aware_layer_computes_with_the_merged_weight(name: str) -> None:
    w4 = random_weight(FORMS[name], SHAPE)
    a, b = (t.double().requires_grad_() for t in small_update(w4))
    merged, x = merged_weight(w4, a, b, 1.0), torch.randn(3, SHAPE[1], dtype=torch.float64, requires_grad=True)
    y = merged_linear_nf4(x, merged, None, a, b, 1.0)
    dense = merged.dequantize().double()
    torch.testing.assert_close(y, x @ dense.T)
    dx, da, db = torch.autograd.grad(y.sum(), [x, a, b])
    torch.testing.assert_close(dx, dense.sum(0).expand(x.shape))
    torch.testing.assert_close(da, b.sum(0)[:, None] * x.sum(0))
    torch.testing.assert_close(db, (x @ a.T).sum(0).expand(b.shape))


class Model(torch.nn.Module):
    """A table, two layers and experts of one form."""

    def __init__(self, name: str) -> None:
        super().__init__()
        form = FORMS[name]
        self.table = Embedding4bit(20, 64, compute_dtype=torch.float32, **form.keywords)
        self.up = Linear4bit(64, 96, True, torch.float64, **form.keywords)
        self.down = Linear4bit(96, 64, False, torch.float64, **form.keywords)
        self.experts = Experts4bit(Experts(), torch.float64, **form.keywords)
        for seed, (_, layer) in enumerate(layers_of(self)):
            for weight, shape in layer.packed_shapes.items():
                layer.set_packed(weight, random_weight(form, shape, seed))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids).double()
        x = x + self.down(self.up(x).relu())
        return x + self.experts(x, *(t.to(x.device) for t in self.routing))


def adapted(name: str, size: float, **options: Any) -> Any:
    torch.manual_seed(0)
    base = Model(name)
    base.routing = routing(7)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **options))
    for key, p in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=size)
    return model.eval()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t.detach().clone() for n, m in layers_of(model) for k, t in m.packed_state().items()}


@EVERY
@pytest.mark.parametrize("size", [0.02, 0.5], ids=["small", "large"])
def test_peft_merges_and_unmerges(name: str, size: float) -> None:
    options = {
        "target_modules": ["table", "up", "down"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    model, ids = adapted(name, size, **options), torch.arange(7)
    before, y = state(model), model(ids)
    model.merge_adapter()
    merged = state(model)
    assert merged.keys() == before.keys()
    changed = {key for key, t in merged.items() if not torch.equal(t, before[key])}
    codes = {key for key in merged if key.endswith((".weight", "_proj"))}
    assert codes <= changed
    if "nf4" not in name and name != "fp4":  # which get scales of their own where the update is large
        assert changed == codes
    model.unmerge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in state(model).items())
    assert torch.equal(model(ids), y)


@EVERY
def test_merge_aware_outputs_are_those_of_the_merged_model(name: str) -> None:
    model, ids = adapted(name, 0.03, target_modules=["up", "down"]), torch.arange(7)
    integration.set_merge_aware(model)
    y = model(ids)
    base, error = integration.merge_to_4bit(model)
    assert torch.equal(base(ids), y)
    assert {layer.form for _, layer in layers_of(base)} == {FORMS[name]}
    assert 0 < error.total < 0.5
