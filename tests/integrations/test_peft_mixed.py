"""Several PEFT adapters at once on 4-bit layers: one per sample (``adapter_names``), or several that are summed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import qlora_ext
from qlora_ext.integrations import peft as integration
from test_peft import adapted, base, counting_fused_calls
from tiny_models import make, token_ids

IDS = token_ids(5)
MASK = torch.ones_like(IDS)
MASK[1, :4] = MASK[4, :9] = 0  # left padding
BASE = "__base__"
# Of different ranks and scalings, on different layers. "default" is on all linear layers.
OTHERS: dict[str, dict[str, Any]] = {
    "few": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "wide": {"r": 17, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    "one": {"r": 1, "lora_alpha": 1, "target_modules": ["v_proj"]},
}


def several(dtype: torch.dtype = torch.float32) -> Any:
    model = adapted(base(dtype=dtype))
    for name, options in OTHERS.items():
        model.add_adapter(name, LoraConfig(init_lora_weights=False, **options))
    return model


def logits(model: Any, names: Sequence[str] | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        by_sample = {} if names is None else {"adapter_names": list(names)}
        out: Tensor = model(input_ids=IDS, attention_mask=MASK, **by_sample, **options).logits
    return out


@contextlib.contextmanager
def alone(model: Any, name: str) -> Any:
    """The model with one adapter for all samples."""
    with model.disable_adapter() if name == BASE else contextlib.nullcontext():
        if name != BASE:
            model.set_adapter(name)
        yield
    model.set_adapter("default")


def adapted_layers(model: Any) -> dict[str, integration.LoraLinear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, integration.LoraLinear4bit)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_have_the_bits_of_batches_with_one_adapter(dtype: torch.dtype) -> None:
    model = several(dtype)
    expected = {}
    for name in ("default", *OTHERS, BASE):
        with alone(model, name):
            expected[name] = logits(model)
    draw = random.Random(3)
    for _ in range(6):
        names = draw.choices([*expected], k=len(IDS))
        with counting_fused_calls() as calls:
            mixed = logits(model, names)
        assert len(calls) == len(adapted_layers(model))  # one operator per layer, whatever the number of adapters
        for sample, name in enumerate(names):
            assert torch.equal(mixed[sample], expected[name][sample]), (names, sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 64), (6, 2, 64), (6, 2, 3, 64), (1, 64)], ids=str)
def test_layers_take_samples_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = one_layer(dtype)
    x = torch.randn(shape, dtype=dtype)
    names = random.Random(1).choices(["default", *OTHERS, BASE], k=len(x))
    mixed = layer(x, adapter_names=names)
    for name in {*names}:
        layer.set_adapter([] if name == BASE else name)
        same = [sample for sample, other in enumerate(names) if other == name]
        assert torch.equal(mixed[same], layer(x)[same])


def one_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(4)
    model = peft.get_peft_model(
        qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48))).to(dtype),
        LoraConfig(target_modules=["0"], r=4, init_lora_weights=False),
    )
    for name, options in OTHERS.items():
        model.add_adapter(name, LoraConfig(**{**options, "target_modules": ["0"], "init_lora_weights": False}))
    return model.eval()


def one_layer(dtype: torch.dtype = torch.float32) -> Any:
    """A layer with all adapters, that of "few" in another dtype."""
    layer = one_model(dtype).base_model.model[0]
    for module in (layer.lora_A, layer.lora_B):
        module["few"].bfloat16()
    return layer


def test_gradients_reach_each_adapter_from_its_samples() -> None:
    layer = one_layer()
    layer.set_adapter(["default", "wide"])  # makes both trainable
    x = torch.randn(4, 3, 64, requires_grad=True)
    names = ["wide", BASE, "default", "wide"]
    dy = torch.randn(4, 3, 48)
    (layer(x, adapter_names=names) * dy).sum().backward()
    mixed = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert mixed.keys() == {f"lora_{m}.{name}.weight" for m in "AB" for name in ("default", "wide")}
    dx = x.grad
    for name in ("default", "wide"):
        layer.zero_grad()
        x.grad = None
        layer.set_adapter(name)
        samples = torch.tensor([n == name for n in names])
        (layer(x) * dy)[samples].sum().backward()
        assert torch.equal(x.grad[samples], dx[samples])
        for m in "AB":
            torch.testing.assert_close(
                layer.get_parameter(f"lora_{m}.{name}.weight").grad, mixed[f"lora_{m}.{name}.weight"]
            )


GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=str,
)
def test_generate(options: dict[str, Any]) -> None:
    model = several()
    names = ["wide", "few", BASE, "default", "wide"]

    def generate(**more: Any) -> Tensor:
        ids: Tensor = model.generate(input_ids=IDS, attention_mask=MASK, do_sample=False, **GENERATE, **options, **more)
        return ids.unflatten(0, (len(IDS), -1))

    mixed = generate(adapter_names=names)
    answers = {}
    for name in {*names}:
        with alone(model, name):
            answers[name] = generate()
    assert not torch.equal(answers["wide"], answers[BASE])
    for sample, name in enumerate(names):
        assert torch.equal(mixed[sample], answers[name][sample])


def test_generate_stacks_adapters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But again in the next call, because programs may write to adapters in any way."""
    model = several()
    names = ["wide", "few", BASE, "default", "wide"]
    stacks: list[Any] = []
    stack = integration.operands.stack_adapters
    monkeypatch.setattr(integration.operands, "stack_adapters", lambda *args: stacks.append(args) or stack(*args))
    model.generate(input_ids=IDS, adapter_names=names, **GENERATE)
    assert len(stacks) == len(adapted_layers(model))
    before = logits(model, names)
    model.base_model.model.model.layers[0].mlp.up_proj.lora_B["wide"].weight.data.mul_(2.0)
    after = logits(model, names)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [name != "wide" for name in names]


def test_repeated_names_for_several_samples_of_a_prompt() -> None:
    """PEFT repeats names for beams only, and rejects the rest."""
    model = several()
    options = {"input_ids": IDS, "num_return_sequences": 2, "do_sample": True, "top_k": 1, **GENERATE}
    names = ["wide", "few", BASE, "default", "wide"]
    with pytest.raises(ValueError, match="got 5 and 10"):
        model.generate(adapter_names=names, **options)
    repeated = model.generate(adapter_names=[name for name in names for _ in range(2)], **options)
    expected = model.generate(input_ids=IDS, adapter_names=names, do_sample=False, **GENERATE)
    assert torch.equal(repeated, expected.repeat_interleave(2, 0))


def test_a_failed_call_leaves_nothing_behind() -> None:
    model = several()
    expected = logits(model)
    with pytest.raises(ValueError, match="got 4 and 5"):
        logits(model, ["wide"] * 4)
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, ["wide", "few", "typo", BASE, BASE])
    assert torch.equal(logits(model), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_calls_of_other_threads_and_calls_inside_calls_have_their_own_names() -> None:
    model = several()
    model.add_adapter("dense", LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    batches = [["wide"] * 5, None, ["few", BASE, "dense", "one", "few"], ["dense"] * 5]
    expected = [logits(model, names) for names in batches]

    def same(i: int) -> bool:
        return torch.equal(logits(model, batches[i % 4]), expected[i % 4])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(16)))
    inner: list[bool] = []

    def call(*_: Any) -> None:
        if not inner:
            inner.append(True)
            inner.append(same(1))

    model.base_model.model.model.register_forward_pre_hook(call)
    assert torch.equal(logits(model, batches[2]), expected[2])
    assert inner == [True, True]


def test_compiled_code_runs_eagerly() -> None:
    """Dynamo does not notice other names, which are in hooks, and would answer with the adapters of an earlier call."""
    model = several()
    batches = [["wide"] * 5, None, ["few", BASE, "default", "one", "few"], None]
    expected = [logits(model, names) for names in batches]
    compiled: list[Any] = []
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend=lambda graph, _: compiled.append(graph) or graph, fullgraph=True)
    assert all(torch.equal(logits(model, n), y) for n, y in zip(batches, expected, strict=True))
    assert len(compiled) == 1
    small = one_model()
    whole, x = torch.compile(small, backend="eager"), torch.randn(2, 64)
    with pytest.raises(ValueError, match="adapter_names: expected a PeftModel that is not compiled"):
        whole(x, adapter_names=["wide", BASE])
    assert torch.equal(whole(x), small(x))


def test_what_cannot_run_fused_runs_as_in_peft() -> None:
    layer = one_layer()
    x = torch.randn(3, 64)
    names = ["default", "wide", BASE]
    fused = layer(x, adapter_names=names)
    seen: list[Any] = []
    handle = layer.lora_B["wide"].register_forward_hook(lambda module, args, y: seen.append(args[0].shape) and None)
    torch.testing.assert_close(layer(x, adapter_names=names), fused)
    assert seen == [(1, layer.r["wide"])]
    handle.remove()
    layer.lora_dropout["wide"] = nn.Dropout(1.0).eval()
    assert torch.equal(layer(x, adapter_names=names), fused)
    layer.lora_dropout["wide"].train()
    dropped = layer(x, adapter_names=names)
    torch.testing.assert_close(dropped[0], fused[0])
    torch.testing.assert_close(dropped[1], layer.base_layer(x)[1])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_lora(options: dict[str, Any]) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(init_lora_weights=False, target_modules=["up_proj"], **options))
    names = ["other", "default", BASE, "other", "default"]
    if "use_dora" in options:
        with pytest.raises(ValueError, match="DoRA"):
            logits(model, names)
        return
    mixed = logits(model, names)
    for name in {*names}:
        with alone(model, name):
            same = [sample for sample, other in enumerate(names) if other == name]
            torch.testing.assert_close(mixed[same], logits(model)[same], rtol=1e-4, atol=1e-4)


def test_merged_and_merge_aware_adapters_are_rejected() -> None:
    model = several()
    names = ["wide", "few", BASE, "default", "wide"]
    expected = logits(model, names)
    model.merge_adapter(["few"])
    with pytest.raises(ValueError, match="adapter_names.*merged adapters.*unmerge_adapter"):
        logits(model, names)
    model.unmerge_adapter()
    assert torch.equal(logits(model, names), expected)
    integration.set_merge_aware(model, adapter_name="few")
    for chosen in (names, ["few"] * 5):  # also if "default" is active
        with pytest.raises(ValueError, match="adapter_names: expected adapters that are not merge-aware.*got few"):
            logits(model, chosen)
    others = [BASE if name == "few" else name for name in names]
    assert torch.equal(logits(model, others)[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


def test_methods_without_adapters_per_sample_are_rejected() -> None:
    model = peft.get_peft_model(base(), peft.IA3Config(task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="adapter_names: expected a method with adapters per sample.*got IA3Model"):
        logits(model, ["default"] * 5)


def test_embeddings_and_dense_layers_run_as_in_peft() -> None:
    quantized = qlora_ext.nn.quantize_model(make("gemma3_text", torch.float32), embeddings=True, skip=["lm_head"])
    model = adapted(quantized, target_modules=["embed_tokens", "q_proj", "lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False))
    names = ["second", "default", BASE, "second", "default"]
    mixed = logits(model, names)
    for name in {*names}:
        with alone(model, name):
            same = [sample for sample, other in enumerate(names) if other == name]
            torch.testing.assert_close(mixed[same], logits(model)[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 5, 60]}], ids=str
)
def test_modules_that_some_adapters_trained(options: dict[str, Any]) -> None:
    """PEFT takes them for samples of that adapter only if it is also active, and then has none for the others."""
    model = adapted(base(dtype=torch.float32), target_modules=["q_proj"])
    model.add_adapter("trained", LoraConfig(r=2, target_modules=["v_proj"], **options))
    for name, parameter in model.named_parameters():
        if "trained" in name and "lora" not in name:
            nn.init.normal_(parameter.data, std=0.1)
    names = ["trained", "default", BASE, "trained", "default"]
    expected = {}
    for name in {*names}:
        with alone(model, name):
            expected[name] = logits(model)
    assert not torch.allclose(expected["trained"], expected[BASE], atol=1e-2)
    for active in ("default", "trained"):
        model.set_adapter(active)
        mixed = logits(model, names)
        for sample, name in enumerate(names):
            torch.testing.assert_close(mixed[sample], expected[name][sample], rtol=1e-4, atol=1e-4)


def test_adapters_change_between_calls(tmp_path: Path) -> None:
    """Hot-swapped, combined, deleted and added again: mixed batches follow."""
    model = several()
    model.save_pretrained(tmp_path, selected_adapters=["wide"])
    names = ["few", "few", BASE, "default", "wide"]
    before = logits(model, names)
    model.add_weighted_adapter(["few", "wide"], [0.5, -1.0], "both", combination_type="cat")
    mixed = logits(model, ["both", *names[1:]])
    assert torch.equal(mixed[1:], before[1:])
    with alone(model, "both"):
        assert torch.equal(mixed[0], logits(model)[0])
    model.delete_adapter("one")
    with pytest.raises(ValueError, match="non-existing"):
        logits(model, ["one", *names[1:]])
    model.load_adapter(tmp_path / "wide", "one")
    assert torch.equal(logits(model, ["one" if name == "wide" else name for name in names]), before)
    model.delete_adapter("few")
    model.add_adapter("few", LoraConfig(r=5, init_lora_weights=True, target_modules=["q_proj"]))  # the identity
    assert torch.equal(logits(model, names)[:2], logits(model, [BASE] * 5)[:2])


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapped_adapters(prepared: bool, tmp_path: Path) -> None:
    """Also with scalings as tensors and padded ranks, as ``prepare_model_for_compiled_hotswap`` makes them."""
    config = LoraConfig(r=6, lora_alpha=3, init_lora_weights=False, target_modules="all-linear")
    other = peft.get_peft_model(base(), config)
    other.save_pretrained(tmp_path)
    model = adapted()
    model.add_adapter("wide", LoraConfig(**OTHERS["wide"], init_lora_weights=False))
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=20)
    names = ["wide", "default", BASE, "default", "wide"]
    before = logits(model, names)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    after = logits(model, names)
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    torch.testing.assert_close(after[[1, 3]], logits(other.eval())[[1, 3]], rtol=1e-4, atol=1e-4)
    with alone(model, "default"):
        assert torch.equal(after[[1, 3]], logits(model)[[1, 3]])


def test_a_hot_swapped_merge_aware_adapter_is_merged_again(tmp_path: Path) -> None:
    peft.get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).save_pretrained(tmp_path)
    model = adapted()
    integration.set_merge_aware(model)
    assert not torch.equal(logits(model), logits(base()))
    hotswap_adapter(model, tmp_path, adapter_name="default")  # B is 0, so that the merged weights are the base's
    torch.testing.assert_close(logits(model), logits(base()))


def exact(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor:
    """The layer with the sum of adapters, in float64."""
    w = layer.base_layer.dequantize(torch.float32).double()
    for name in names:
        w = w + layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double() * float(layer.scaling[name])
    y: Tensor = x.double() @ w.T
    return y + layer.base_layer.bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [["default", "wide", "few", "one"], ["one", "default"]], ids="+".join)
def test_sums_are_one_operator(names: list[str], dtype: torch.dtype) -> None:
    layer = one_layer(dtype)
    layer.set_adapter(names)
    x = torch.randn(2, 5, 64, dtype=dtype)
    with torch.no_grad(), counting_fused_calls() as calls:
        y = layer(x)
        assert calls == ["fused"]
        error = (y - exact(layer, x, names)).norm() / y.norm()
        layer.base_layer.register_forward_hook(lambda *_: None)
        theirs = (layer(x) - exact(layer, x, names)).norm() / y.norm()
    assert calls == ["fused", "plain"]
    assert error <= {torch.float32: 3e-7, torch.float64: 1e-6}.get(dtype, 1.5 * theirs.item())


def test_models_sum_adapters_and_train_them() -> None:
    model = several()
    model.base_model.set_adapter(["few", "default", "wide"])

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with counting_fused_calls() as calls:
        fused, gradients = step()
    assert calls == ["fused"] * len(adapted_layers(model))
    for layer in adapted_layers(model).values():
        layer.base_layer.register_forward_hook(lambda *_: None)
    theirs, expected = step()
    torch.testing.assert_close(fused, theirs, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    assert not any(".one." in name for name in gradients)


def test_sums_with_dropout_draw_a_mask_per_adapter() -> None:
    layer = one_layer()
    layer.set_adapter(["default", "wide"])
    layer.lora_dropout["wide"] = nn.Dropout(0.5)
    x = torch.randn(5, 64)
    with counting_fused_calls() as calls:
        layer.eval()(x)
        torch.manual_seed(1)
        y = layer.train()(x)
    assert calls == ["fused", "plain"]
    torch.manual_seed(1)
    dropped = layer.lora_dropout["wide"](x)
    layer.eval()
    parts = {"default": x, "wide": dropped}
    expected = layer.base_layer(x)
    for name, part in parts.items():
        expected = expected + layer.lora_B[name](layer.lora_A[name](part)) * layer.scaling[name]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_cast_adapters_give_the_same_bits() -> None:
    model = several(torch.bfloat16)
    names = ["wide", "few", BASE, "default", "one"]
    expected = logits(model, names)
    model.base_model.set_adapter(["few", "wide"])
    total = logits(model)
    model.set_adapter("default")
    integration.cast_fused(model)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert torch.equal(logits(model, names), expected)
    model.base_model.set_adapter(["few", "wide"])
    # Where scalings differ, B is rounded before and after it is multiplied.
    torch.testing.assert_close(logits(model), total, rtol=0.05, atol=0.05)
