"""Adapters merge into weights of every form: scales and offsets stay, codes hold the update, and unmerging is exact.
Calibrated merging retains an update even if each weight changes by less than a step between codes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import forms
import moe_families
import qlora_ext
from adapted_models import adapted, base, draw
from forms import MODULE_FORMS as FORMS
from forms import random_weight
from qlora_ext._internal import bit_planes
from qlora_ext.calibration import Calibration, calibration_of
from qlora_ext.formats import code_values
from qlora_ext.integrations import peft as integration
from qlora_ext.merged_linear import merged_linear_nf4
from qlora_ext.merging.codes import (
    encode_like,
    merged_weight,
    retained_update,
    seed_of,
    with_nearest_codes,
    with_update,
)
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, layers_of
from qlora_ext.weight import Weight4bit
from tiny_experts import Experts, routing
from tiny_models import logits, token_ids

EVERY = pytest.mark.parametrize("name", FORMS)
SHAPE = (96, 160)
IDS = token_ids(4, 24)


def drawn(size: float = 0.03, seed: int = 1, **options: Any) -> Any:
    """Adapters that change each weight by less than half the distance between two codes."""
    model = adapted(lora_alpha=4, **options)
    torch.manual_seed(seed)
    return draw(model, std=size)


def of_ids(model: Any) -> Tensor:
    return logits(model, IDS)


def same_but_codes(a: Weight4bit, b: Weight4bit) -> bool:
    return a.form == b.form and all(torch.equal(t, b.tensors[key]) for key, t in a.tensors.items() if key != "packed")


def decoded(w4: Weight4bit) -> Tensor:
    if len(w4.shape) == 2:
        return w4.dequantize()
    return torch.stack([w4.matrix(e).dequantize() for e in range(len(w4.packed))])


def small_update(w4: Weight4bit, factor: float = 0.04) -> tuple[Tensor, Tensor]:
    """An adapter of rank 8 whose update is far smaller than the distance of neighbouring codes; of stacks, too."""
    values = torch.tensor(code_values(w4.code))[bit_planes.unpack(w4.packed, w4.form.bits).long()].unique()
    step = w4.decoded_scales().abs().mean() * values.diff().mean()
    *lead, n, k = w4.shape
    return torch.randn(*lead, 8, k) / 8**0.5, factor * step * torch.randn(*lead, n, 8)


@EVERY
def test_codes_hold_an_update_below_their_distance(name: str) -> None:
    w4 = random_weight(FORMS[name], SHAPE)
    a, b = small_update(w4)
    update, w = 2.0 * (b @ a), w4.dequantize()
    assert torch.equal(with_update(w4, w).dequantize(), w)  # nothing moves without an update
    merged = merged_weight(w4, a, b, 2.0)
    assert same_but_codes(merged, w4)
    assert torch.equal(merged_weight(w4, a, b, 2.0).packed, merged.packed)
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
@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4", "q4_0", "q4_1", "iq4_nl", "q5_1", "q8_0"])
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
    for shape in (SHAPE, (3, 32, 96)):
        w4 = random_weight(FORMS[name], shape)
        w = decoded(w4)
        again = with_nearest_codes(w4, w)
        assert same_but_codes(again, w4)
        assert torch.equal(decoded(again), w)
        assert torch.equal(with_update(w4, w, seed=3).packed, again.packed)


@pytest.mark.parametrize("stack", [(), (3,)], ids=["linear", "experts"])
@EVERY
def test_gradients_pass_the_rounding(name: str, stack: tuple[int, ...]) -> None:
    """The layer is the one over the merged weight, and A and B have the gradients of the sum without rounding."""
    w4 = random_weight(FORMS[name], (*stack, *SHAPE))
    leaves = [
        t.double().requires_grad_() for t in (torch.randn(7, SHAPE[1]), torch.randn(*stack, 96), *small_update(w4))
    ]
    x, bias, a, b = leaves
    offsets, rows, dy = torch.tensor([2, 2, 7]), [0, 0, 2, 2, 2, 2, 2], torch.randn(7, 96).double()
    merged = merged_weight(w4, a, b, 2.0, 5)
    if stack:
        assert torch.equal(merged.matrix(1).packed, merged_weight(w4.matrix(1), a[1], b[1], 2.0, seed_of("5.1")).packed)
    y = merged_linear_nf4(x, merged, bias, a, b, 2.0, *((offsets,) if stack else ()))
    update = 2.0 * b @ a
    w = decoded(merged).double() + update - update.detach()
    expected = torch.einsum("sk,snk->sn", x, w[rows]) + bias[rows] if stack else x @ w.T + bias
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_other_dtypes(dtype: torch.dtype) -> None:
    w4 = qlora_ext.quantize_nf4(torch.randn(96, 128))
    x, bias, a, b = (t.to(dtype).requires_grad_() for t in (torch.randn(7, 128), torch.randn(96), *small_update(w4)))
    merged, dy = merged_weight(w4, a, b, 2.0), torch.randn(7, 96).to(dtype)
    y = merged_linear_nf4(x, merged, bias, a, b, 2.0)
    assert torch.equal(y, qlora_ext.linear_nf4(x, merged, bias))
    found = torch.autograd.grad(y, [x, bias, a, b], dy)
    exact = [t.detach().double().requires_grad_() for t in (x, bias, a, b)]
    update = 2.0 * exact[3] @ exact[2]
    of_all = exact[0] @ (decoded(merged).double() + update - update.detach()).T + exact[1]
    for gradient, expected in zip(found, torch.autograd.grad(of_all, exact, dy.double()), strict=True):
        assert (gradient.double() - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


class Model(torch.nn.Module):
    """A table, two layers and experts of one form."""

    def __init__(self, name: str) -> None:
        super().__init__()
        form = FORMS[name]
        self.table = Embedding4bit(20, 64, compute_dtype=torch.float32, **form.keywords)
        self.up = Linear4bit(64, 96, True, torch.float64, **form.keywords)
        self.down = Linear4bit(96, 64, False, torch.float64, **form.keywords)
        self.experts = Experts4bit(Experts(inner=48 if form.bits == 4 else 64), torch.float64, **form.keywords)
        for seed, (_, layer) in enumerate(layers_of(self)):
            for weight, shape in layer.packed_shapes.items():
                layer.set_packed(weight, random_weight(form, shape, seed))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).double()
        x = x + self.down(self.up(x).relu())
        return x + self.experts(x, *(t.to(x.device) for t in self.routing))


def of_form(name: str, size: float, **options: Any) -> Any:
    torch.manual_seed(0)
    dense = Model(name)
    dense.routing = routing(7)
    model = peft.get_peft_model(dense, peft.LoraConfig(r=4, init_lora_weights=False, **options))
    return draw(model, std=size).eval()


def state(model: Any) -> dict[str, Tensor]:
    return {f"{n}.{k}": t.detach().clone() for n, m in layers_of(model) for k, t in m.packed_state().items()}


@EVERY
@pytest.mark.parametrize("size", [0.02, 0.5], ids=["small", "large"])
def test_peft_merges_and_unmerges(name: str, size: float) -> None:
    options = {
        "target_modules": ["table", "up", "down"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    model, ids = of_form(name, size, **options), torch.arange(7)
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


@pytest.mark.parametrize("name", forms.FORMS)
def test_merge_aware_outputs_are_those_of_the_merged_model(name: str) -> None:
    model, ids = of_form(name, 0.03, target_modules=["up", "down"]), torch.arange(7)
    integration.set_merge_aware(model)
    y = model(ids)
    merged, error = integration.merge_to_4bit(model)
    assert torch.equal(merged(ids), y)
    assert {layer.form for _, layer in layers_of(merged)} == {FORMS[name]}
    assert 0 < error.total < 0.5


@pytest.mark.parametrize("name", forms.SOME_WIDE)
def test_merge_aware_training_has_4_bits(name: str) -> None:
    model = of_form(name, 0.03, target_modules=["up", "down"])
    with pytest.raises(ValueError, match="adapter_name: expected an adapter on 4-bit layers"):
        integration.set_merge_aware(model)
    w4 = random_weight(FORMS["q4_0"], (96, 64))
    model.base_model.model.up.base_layer.set_packed("weight", w4)
    integration.set_merge_aware(model)
    assert [m.merge_aware for _, m in model.named_modules() if hasattr(m, "merge_aware")] == [{"default"}, set()]


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
    model = drawn()
    seeds = {n: m.rounding_seed for n, m in model.named_modules() if isinstance(m, integration.LoraLinear4bit)}
    assert len({*seeds.values()}) == len(seeds) == 14
    for name, seed in seeds.items():
        assert seed == seed_of(f"{name.removeprefix('base_model.model.')}.weight")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    again.load_adapter(tmp_path, adapter_name="second")
    assert seeds == {n: m.rounding_seed for n, m in again.named_modules() if isinstance(m, integration.LoraLinear4bit)}
    model.merge_adapter()
    merged, _ = integration.merge_to_4bit(again)
    expected = {n.removeprefix("base_model.model.").replace(".base_layer", ""): m for n, m in layers_of(model)}
    for name, layer in layers_of(merged):
        assert torch.equal(layer.weight, expected[name].weight)  # type: ignore[arg-type]


def test_adapters_on_copies_of_a_layer_merge_and_unmerge_by_themselves() -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "layer_replication": [(0, 2), (0, 2)]}
    model = drawn(size=0.3, **options)
    state = {name: [*layer.packed_state().values()] for name, layer in layers_of(model)}
    bits = {name: [t.clone() for t in tensors] for name, tensors in state.items()}
    assert len({t[0].data_ptr() for t in state.values()}) < len(state)
    expected = of_ids(model)
    layers = [m for m in model.modules() if isinstance(m, integration.LoraLinear4bit)]
    for order in (layers, layers[::-1], layers[1::2] + layers[::2]):
        model.merge_adapter()
        model.merge_adapter()
        merged = of_ids(model)
        assert (merged - expected).norm() < 0.2 * expected.norm()  # each copy has only its own adapter
        for layer in order:
            layer.unmerge()
        for name, layer in layers_of(model):
            for t, same, before in zip(layer.packed_state().values(), state[name], bits[name], strict=True):
                assert t is same
                assert torch.equal(t, before)
        assert torch.equal(of_ids(model), expected)
    assert torch.equal(of_ids(integration.merge_to_4bit(model)[0]), merged)


@pytest.mark.parametrize("order", [("default", "second"), ("second", "default")])
def test_two_adapters_leave_the_bits_that_they_found(order: tuple[str, str]) -> None:
    model = drawn()
    bits = {name: layer.weight.packed.clone() for name, layer in layers_of(model)}
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    for names in ([order[0]], [order[1]], [*order]):
        model.merge_adapter(names)
    model.unmerge_adapter()
    for name, layer in layers_of(model):
        assert torch.equal(layer.weight.packed, bits[name])


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
    model = drawn(size=size)
    scales = [layer.absmax.clone() for _, layer in layers_of(model)]
    merged, error = integration.merge_to_4bit(model)
    after = [layer.absmax for _, layer in layers_of(merged)]
    assert len(scales) > 0
    assert all(torch.equal(a, b) for a, b in zip(scales, after, strict=True)) == (size < 1.0)
    assert 0.9 < error.retained < 1.1
    assert error.total < 0.12


def test_retained_is_a_share_of_the_update() -> None:
    before, update = torch.randn(8, 8), torch.randn(8, 8)
    for share in (0.0, 0.5, 1.0):
        retained, total = retained_update(update, before, before + share * update)
        assert retained / total == pytest.approx(share, abs=1e-5)


TEXT = torch.arange(8 * 32).reshape(8, 32) * 7 % 61


def little(mixed: bool = False, **config: Any) -> Any:
    """A model with an adapter that changes no weight enough for a different code."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    )
    lora = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, **config)
    model = peft.get_peft_model(qlora_ext.quantize_model(model), lora, mixed=mixed)
    torch.manual_seed(1)
    return draw(model, std=0.004**0.5)


def of_text(model: Any) -> Tensor:
    return logits(model, TEXT)


def test_it_retains_the_update_that_rounding_loses() -> None:
    model = little(target_modules="all-linear")
    learnt = of_text(model)
    with model.disable_adapter():
        without = of_text(model)
    rounded, _ = integration.merge_to_4bit(copy.deepcopy(model))
    merged = integration.merge_calibrated(model, Calibration(TEXT))
    plain, calibrated = ((of_text(m) - learnt).norm() / (without - learnt).norm() for m in (rounded, merged))
    assert calibrated < 0.6 * plain, (calibrated, plain)
    assert {r.method for r in calibration_of(merged)} == {"feedback"}
    assert all(isinstance(m, Linear4bit) for n, m in merged.named_modules() if n.endswith("_proj"))


def test_layers_without_an_adapter_keep_their_bits() -> None:
    model = little(target_modules=["up_proj"])
    before = {name: layer.weight.clone() for name, layer in layers_of(model.get_base_model())}
    form = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj").form
    merged = integration.merge_calibrated(model, Calibration(TEXT))
    changed = set()
    for name, layer in layers_of(merged):
        assert layer.form == form
        old = before.get(name, before.get(f"{name}.base_layer"))
        if not torch.equal(layer.weight, old):
            changed.add(name.rpartition(".")[2])
    assert changed == {"up_proj"}
    assert [r.name for r in calibration_of(merged)] == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]


def test_mixed_models_merge_like_others() -> None:
    models = (little(mixed=mixed, target_modules=["up_proj"]) for mixed in (False, True))
    one, other = (integration.merge_calibrated(model, Calibration(TEXT)) for model in models)
    assert torch.equal(of_text(one), of_text(other))


def test_experts_are_merged_one_by_one() -> None:
    model = draw(moe_families.adapted("Mixtral"), std=0.05).eval()
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(2))
    merged = integration.merge_calibrated(model, Calibration(ids))
    report = {r.name.rpartition(".")[2]: r for r in calibration_of(merged)}
    assert {"gate_up_proj", "down_proj"} <= report.keys()
    assert all(r.error < r.absmax_error for r in report.values())


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="model: expected an active adapter on a 4-bit layer, found none"):
        integration.merge_calibrated(little(target_modules=["lm_head"]), Calibration(TEXT))
