"""Several PEFT adapters at once on 4-bit experts and on their router: one per sample (``adapter_names``)."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moe_families
from qlora_ext.integrations import peft as integration
from qlora_ext.integrations.peft.experts import LoraExperts4bit
from qlora_ext.nn import Experts4bit, quantize_model
from test_moe import CONFIGS, moe
from test_peft_experts import EXPERTS, draw, gpt_oss
from tiny_models import token_ids

BASE = "__base__"
IDS = token_ids(5)
NAMES = ["wide", "down", BASE, "default", "wide"]
# Of different ranks and scalings. "default" and "wide" are on all experts, "down" on one of their weights.
OTHERS: dict[str, dict[str, Any]] = {
    "wide": {"r": 5, "lora_alpha": 3, "target_modules": ["q_proj"]},
    "down": {"r": 2, "lora_alpha": 4, "target_modules": []},
}


def several(build: Any = moe, dtype: torch.dtype = torch.float32, more: Sequence[str] = ()) -> Any:
    parameters = {"target_parameters": [*EXPERTS, *more], "task_type": "CAUSAL_LM"}
    model = get_peft_model(quantize_model(build()).to(dtype), LoraConfig(r=3, target_modules=["v_proj"], **parameters))
    torch.manual_seed(7)
    draw(model.eval())
    for name, options in OTHERS.items():
        try:
            model.add_adapter(name, LoraConfig(**options, **parameters))
        except ValueError as error:  # PEFT 0.19
            pytest.skip(f"this PEFT has one adapter of target_parameters: {error}")
        draw(model, name)
    for m in model.modules():
        if isinstance(m, LoraExperts4bit) and m.parameter_name != "down_proj":
            m.delete_adapter("down")
    return model


@contextlib.contextmanager
def alone(model: Any, name: str) -> Iterator[None]:
    """The model with one adapter for all samples."""
    with model.disable_adapter() if name == BASE else contextlib.nullcontext():
        if name != BASE:
            model.set_adapter(name)
        yield
    model.set_adapter("default")


def logits(model: Any, names: Sequence[str] | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, **({} if names is None else {"adapter_names": [*names]})).logits
    return out


def blocks(model: Any) -> list[nn.Module]:
    """The modules that route tokens to experts."""
    parents = [m for m in model.modules() if not isinstance(m, LoraExperts4bit)]
    return [m for m in parents if any(isinstance(child, LoraExperts4bit) for child in m.children())]


def output(block: nn.Module, x: Tensor) -> Tensor:
    y: Any = block(x)
    return y[0] if isinstance(y, tuple) else y


def by_sample(model: Any, block: nn.Module, x: Tensor, names: Sequence[str]) -> Tensor:
    with model._enable_peft_forward_hooks(adapter_names=[*names]):
        return output(block, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [*(lambda f=f: moe(f) for f in CONFIGS), gpt_oss], ids=[*CONFIGS, "gpt_oss"])
def test_samples_have_the_bits_of_batches_with_one_adapter(build: Any, dtype: torch.dtype) -> None:
    """Of the same routing, that is in one block. Later blocks get other tokens, and so other experts get other ones."""
    model = several(build, dtype)
    choose = random.Random(3)
    with torch.no_grad():
        for block in blocks(model):
            x = torch.randn(5, 7, 64, dtype=dtype)
            expected = {}
            for name in ("default", *OTHERS, BASE):
                with alone(model, name):
                    expected[name] = output(block, x)
            for _ in range(4):
                names = choose.choices([*expected], k=len(x))
                mixed = by_sample(model, block, x, names)
                for sample, name in enumerate(names):
                    assert torch.equal(mixed[sample], expected[name][sample]), (names, sample)


def test_shared_experts_which_see_flattened_tokens() -> None:
    model = get_peft_model(quantize_model(moe_families.build("Qwen2-MoE")), LoraConfig(target_modules="all-linear"))
    model.add_adapter("wide", LoraConfig(r=5, target_modules=["up_proj", "shared_expert_gate"]))
    draw(model.eval(), "default")
    draw(model, "wide")
    names = ["wide", "default", BASE, "wide", "default"]
    mixed = logits(model, names)
    for sample, name in enumerate(names):
        with alone(model, name):
            torch.testing.assert_close(mixed[sample], logits(model)[sample], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got 3 and 5"):
        logits(model, names[:3])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("more", [[], ["mlp.gate.weight"]], ids=["experts", "router"])
def test_models(family: str, more: list[str]) -> None:
    model = several(lambda: moe(family), more=more)
    mixed = logits(model, NAMES)
    answers = {}
    for name in {*NAMES}:
        with alone(model, name):
            answers[name] = logits(model)
    assert (answers["wide"] - answers[BASE]).norm() > 0.01 * answers[BASE].norm()
    for sample, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[sample], answers[name][sample], rtol=1e-4, atol=1e-4)


def test_experts_run_once_whatever_the_number_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = several()
    calls: list[str] = []
    grouped = Experts4bit._grouped
    monkeypatch.setattr(Experts4bit, "_grouped", lambda *args: calls.append("grouped") or grouped(*args))
    logits(model, NAMES)
    assert calls == ["grouped"] * 4  # two weights of two layers


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_generate(options: dict[str, Any]) -> None:
    model = several(more=["mlp.gate.weight"])

    def generate(**more: Any) -> Tensor:
        lengths = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
        ids: Tensor = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **lengths, **options, **more)
        return ids

    mixed = generate(adapter_names=NAMES)
    answers = {}
    for name in {*NAMES}:
        with alone(model, name):
            answers[name] = generate()
    assert not torch.equal(answers["wide"], answers[BASE])
    for sample, name in enumerate(NAMES):
        assert torch.equal(mixed[sample], answers[name][sample])


@pytest.mark.parametrize("more", [[], ["mlp.gate.weight"]], ids=["experts", "router"])
def test_gradients_reach_each_adapter_from_its_samples(more: list[str]) -> None:
    model = several(more=more)
    block = blocks(model)[0]
    x, dy = torch.randn(5, 6, 64, requires_grad=True), torch.randn(5, 6, 64)

    def gradients(names: Sequence[str]) -> dict[str, Tensor]:
        for key, p in block.named_parameters():  # PEFT makes the active adapters trainable
            p.requires_grad_("lora_" in key)
        y = output(block, x) if len({*names}) == 1 else by_sample(model, block, x, names)
        model.zero_grad()
        x.grad = None
        y.backward(torch.where(torch.tensor([name in names for name in NAMES])[:, None, None], dy, 0))
        trained = {key: p.grad.clone() for key, p in block.named_parameters() if p.grad is not None}
        return {"x": x.grad, **trained}

    mixed = gradients(NAMES)
    seen = {"x"}
    for name in ("default", "wide", "down"):
        samples = torch.tensor([n == name for n in NAMES])
        with alone(model, name):
            expected = gradients([name])
        torch.testing.assert_close(mixed["x"][samples], expected.pop("x")[samples], rtol=1e-4, atol=1e-5)
        for key, gradient in expected.items():
            torch.testing.assert_close(mixed[key], gradient, rtol=1e-4, atol=1e-5)
        seen |= {*expected}
    assert seen == {*mixed}


def test_wrong_numbers_of_names_are_rejected_if_only_experts_have_adapters() -> None:
    """The experts see tokens only, whose number other numbers of samples may divide too."""
    config = LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model = draw(get_peft_model(quantize_model(moe()), config).eval())
    assert IDS.numel() % 2 == 0
    expected = logits(model)
    for names in (["default"] * 2, ["default", BASE] * 5):
        with pytest.raises(ValueError, match=f"got {len(names)} and 5"):
            logits(model, names)
    assert torch.equal(logits(model), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_experts_outside_of_a_block_are_rejected() -> None:
    model = several()
    experts = next(m for m in model.modules() if isinstance(m, LoraExperts4bit))
    index, weights = torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1)
    with (
        pytest.raises(
            ValueError, match=r"adapter_names: adapters on \w+_proj need a model that passes them all tokens"
        ),
        model._enable_peft_forward_hooks(adapter_names=["wide"] * 5),
    ):
        experts(torch.randn(10, 64), index, weights)


def test_merged_and_merge_aware_adapters_are_rejected() -> None:
    model = several()
    model.merge_adapter(["down"])
    with pytest.raises(ValueError, match="adapter_names.*merged adapters.*unmerge_adapter"):
        logits(model, NAMES)
    model.unmerge_adapter()
    integration.set_merge_aware(model, adapter_name="down")
    with pytest.raises(ValueError, match="adapter_names: expected adapters that are not merge-aware.*got down"):
        logits(model, NAMES)


def test_dropout_has_one_probability() -> None:
    model = several()
    block, x = blocks(model)[0], torch.randn(2, 6, 64)

    def run(p: float, of_wide: float) -> Tensor:
        for name, probability in (("default", p), ("wide", of_wide)):
            integration.set_dropout(model, name, probability)
        for m in block.modules():
            if isinstance(m, nn.Dropout):
                m.train()
        return by_sample(model, block, x, ["wide", "default"])

    with torch.no_grad():
        clean, dropped = run(0.0, 0.0), run(0.5, 0.5)
        assert all(not torch.equal(*samples) for samples in zip(dropped, clean, strict=True))
        assert torch.equal(run(1.0, 1.0), by_sample(model, block, x, [BASE, BASE]))
        with pytest.raises(ValueError, match="lora_dropout: expected one probability"):
            run(0.5, 0.25)


class Pooled(nn.Module):
    """A dense parameter beside a 4-bit layer."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.linear, self.weight, self.mean = nn.Linear(64, 48), nn.Parameter(torch.randn(8, 48)), mean

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        y = self.linear(x) @ self.weight.T
        return (y.mean(), []) if self.mean else (y, [y.argmax(-1).flatten(), None])


def pooled(mean: bool) -> Any:
    torch.manual_seed(0)
    parameters = {"target_modules": [], "target_parameters": ["inner.weight"]}
    model = get_peft_model(quantize_model(nn.Sequential(OrderedDict(inner=Pooled(mean)))), LoraConfig(**parameters))
    model.add_adapter("wide", LoraConfig(r=5, **parameters))
    draw(model, "wide")
    return draw(model.eval())


def test_parameters_run_once_per_adapter() -> None:
    model, x = pooled(False), torch.randn(3, 4, 64)
    scores, (best, nothing) = model(x, adapter_names=["wide", BASE, "default"])
    assert nothing is None
    for sample, name in enumerate(["wide", BASE, "default"]):
        with alone(model, name):
            expected = model(x)
        assert torch.equal(scores[sample], expected[0][sample])
        assert torch.equal(best.view(3, 4)[sample], expected[1][0].view(3, 4)[sample])
    with pytest.raises(ValueError, match="got 2 and 3"):
        model(x, adapter_names=["wide", BASE])


def test_parameters_whose_outputs_have_no_rows_of_tokens_are_rejected() -> None:
    model = pooled(True)
    with pytest.raises(
        ValueError, match=r"adapter_names: expected outputs with a row per token \(12\).*got shape \[\]"
    ):
        model(torch.randn(3, 4, 64), adapter_names=["wide", BASE, "default"])


def test_the_weight_of_a_linear_layer_is_a_parameter_with_several_adapters() -> None:
    torch.manual_seed(0)
    base = quantize_model(nn.Sequential(OrderedDict(linear=nn.Linear(64, 48))))
    parameters = {"target_modules": [], "target_parameters": ["linear.weight"]}
    model = draw(get_peft_model(base, LoraConfig(r=3, **parameters)).eval())
    try:
        model.add_adapter("wide", LoraConfig(r=5, **parameters))
    except ValueError as error:  # PEFT 0.19
        pytest.skip(f"this PEFT has one adapter of target_parameters: {error}")
    draw(model, "wide")
    layer, x = model.base_model.model.linear, torch.randn(4, 64)
    for name in ("default", "wide"):
        model.set_adapter(name)
        expected = layer.base_layer(x) + x @ layer.get_delta_weight(name).T
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear.bias", "embed.weight"])
def test_other_parameters_of_4bit_modules_are_rejected(name: str) -> None:
    layers = OrderedDict(embed=nn.Embedding(16, 64), linear=nn.Linear(64, 48))
    model = quantize_model(nn.Sequential(layers), embeddings=True)
    with pytest.raises(
        ValueError, match=f"target_parameters: expected weights of linear layers or experts, got {name}"
    ):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=[name]))
