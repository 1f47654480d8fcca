"""Several PEFT adapters at once on 4-bit layers, experts and their router: one per sample (``adapter_names``)."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moe_families
from adapted_models import BASE, EXPERTS, adapted, add_adapter, alone, base, counting_fused_calls, draw
from qlora_ext.integrations import peft as integration
from qlora_ext.integrations.peft.experts import LoraExperts4bit
from qlora_ext.nn import Experts4bit, quantize_model
from tiny_models import MIXTURES, logits, make, token_ids

IDS = token_ids(5)
MASK = torch.ones_like(IDS)
MASK[1, :4] = MASK[4, :9] = 0  # left padding
NAMES = ["wide", "few", BASE, "default", "wide"]
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


def mixture(family: str = "mixtral", dtype: torch.dtype = torch.float32, more: Sequence[str] = ()) -> Any:
    """Adapters of different ranks and scalings: "default" and "wide" on all experts, "few" on one of their weights."""
    options = {"target_parameters": [*EXPERTS, *more], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(family).to(dtype), LoraConfig(r=3, target_modules=["v_proj"], **options))
    torch.manual_seed(7)
    draw(model.eval())
    add_adapter(model, "wide", LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj"], **options))
    add_adapter(model, "few", LoraConfig(r=2, lora_alpha=4, target_modules=[], **options))
    for m in model.modules():
        if isinstance(m, LoraExperts4bit) and m.parameter_name != "down_proj":
            m.delete_adapter("few")
    return model


def router() -> Any:
    return mixture(more=["mlp.gate.weight"])


def of_samples(model: Any, names: Sequence[str] | None = None) -> Tensor:
    """The logits of five samples."""
    return logits(model, IDS, attention_mask=MASK, **({} if names is None else {"adapter_names": [*names]}))


def of_each_alone(model: Any, compute: Callable[[], Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """What is computed with each adapter for all samples."""
    found = {}
    for name in {*names}:
        with alone(model, name):
            found[name] = compute()
    return found


def adapted_layers(model: Any) -> dict[str, integration.LoraLinear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, integration.LoraLinear4bit)}


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


def check_random_names(expected: dict[str, Tensor], mixed_of: Callable[[list[str]], Tensor], times: int) -> None:
    choose = random.Random(3)
    for _ in range(times):
        names = choose.choices(["default", *sorted({*expected} - {"default", BASE}), BASE], k=5)
        mixed = mixed_of(names)
        for sample, name in enumerate(names):
            assert torch.equal(mixed[sample], expected[name][sample]), (names, sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_have_the_bits_of_batches_with_one_adapter(dtype: torch.dtype) -> None:
    model = several(dtype)

    def mixed(names: list[str]) -> Tensor:
        with counting_fused_calls() as calls:
            found = of_samples(model, names)
        assert len(calls) == len(adapted_layers(model))  # one operator per layer, whatever the number of adapters
        return found

    expected = of_each_alone(model, lambda: of_samples(model), ("default", *OTHERS, BASE))
    check_random_names(expected, mixed, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MIXTURES)
def test_samples_of_a_block_of_experts_have_the_bits_of_batches_with_one_adapter(
    family: str, dtype: torch.dtype
) -> None:
    """Of the same routing, that is in one block. Later blocks get other tokens, and so other experts get other ones."""
    model = mixture(family, dtype)
    with torch.no_grad():
        for block in blocks(model):
            x = torch.randn(5, 7, 64, dtype=dtype)
            expected = of_each_alone(model, lambda block=block, x=x: output(block, x), (*NAMES, "few"))
            check_random_names(expected, lambda names, block=block, x=x: by_sample(model, block, x, names), 4)


@pytest.mark.cuda
def test_samples_of_a_block_of_experts_on_cuda() -> None:
    """The values and gradients are those of the CPU."""

    def values(device: str) -> list[Tensor]:
        model = mixture().to(device)
        block = blocks(model)[0]
        x = torch.linspace(-1, 1, 5 * 7 * 64).sin().reshape(5, 7, 64).to(device).requires_grad_()
        adapters = [p.requires_grad_() for name, p in block.named_parameters() if "lora" in name]
        y = by_sample(model, block, x, NAMES)
        gradients = torch.autograd.grad(y.square().sum(), [x, *adapters])
        return [t.cpu() for t in (y.detach(), *gradients)]

    for got, want in zip(values("cuda"), values("cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


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
    model = get_peft_model(
        quantize_model(nn.Sequential(nn.Linear(64, 48))).to(dtype),
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


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.other = nn.Linear(64, 64), nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.base_layer(x))


def test_layers_beside_one_named_base_layer() -> None:
    torch.manual_seed(0)
    options = {"target_modules": ["base_layer", "other"], "init_lora_weights": False}
    model = get_peft_model(quantize_model(Beside()), LoraConfig(**options)).eval()
    model.add_adapter("wide", LoraConfig(r=5, **options))
    x, names = torch.randn(4, 64), ["wide", "default", "default", "wide"]
    mixed = model(x, adapter_names=names)
    for sample, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(mixed[sample], model(x)[sample])


def with_shared_experts() -> Any:
    """They see flattened tokens."""
    model = get_peft_model(quantize_model(moe_families.build("Qwen2-MoE")), LoraConfig(target_modules="all-linear"))
    model.add_adapter("wide", LoraConfig(r=5, target_modules=["up_proj", "shared_expert_gate"]))
    return draw(draw(model.eval(), "default"), "wide")


def with_embeddings_and_a_dense_head() -> Any:
    quantized = quantize_model(make("gemma3_text", torch.float32), embeddings=True, skip=["lm_head"])
    model = adapted(quantized, target_modules=["embed_tokens", "q_proj", "lm_head"])
    model.add_adapter("wide", LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False))
    return model


def with_biases() -> Any:
    model = adapted()
    options = {"init_lora_weights": False, "target_modules": ["up_proj"], "lora_bias": True}
    model.add_adapter("wide", LoraConfig(**options))
    return model


def trained(active: str = "default", **options: Any) -> Any:
    """PEFT takes modules for samples of an adapter only if it is also active, and then has none for the others."""
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("wide", LoraConfig(r=2, target_modules=["v_proj"], **options))
    for name, parameter in model.named_parameters():
        if "wide" in name and "lora" not in name:
            nn.init.normal_(parameter.data, std=0.1)
    model.set_adapter(active)
    return model


TOKENS = {"trainable_token_indices": [1, 5, 60]}
MODELS: dict[str, Callable[[], Any]] = {
    **{family: lambda family=family: mixture(family) for family in ("mixtral", "qwen3_moe")},
    **{f"{f}, router": lambda f=f: mixture(f, more=["mlp.gate.weight"]) for f in ("mixtral", "qwen3_moe")},
    "shared experts": with_shared_experts,
    "embeddings": with_embeddings_and_a_dense_head,
    "biases": with_biases,
    "head": lambda: trained(modules_to_save=["lm_head"]),
    "head, active": lambda: trained("wide", modules_to_save=["lm_head"]),
    "tokens": lambda: trained(**TOKENS),
    "tokens, active": lambda: trained("wide", **TOKENS),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str) -> None:
    model = MODELS[kind]()
    names = NAMES if kind.startswith(("mixtral", "qwen3")) else ["wide", "default", BASE, "wide", "default"]
    mixed = of_samples(model, names)
    answers = of_each_alone(model, lambda: of_samples(model), names)
    assert (answers["wide"] - answers[BASE]).norm() > 0.01 * answers[BASE].norm()
    for sample, name in enumerate(names):
        torch.testing.assert_close(mixed[sample], answers[name][sample], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got 3 and 5"):
        of_samples(model, names[:3])


def test_experts_run_once_whatever_the_number_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    calls: list[str] = []
    grouped = Experts4bit._grouped
    monkeypatch.setattr(Experts4bit, "_grouped", lambda *args: calls.append("grouped") or grouped(*args))
    of_samples(model, NAMES)
    assert calls == ["grouped"] * 4  # two weights of two layers


def decoder_layer(model: Any) -> nn.Module:
    return model.base_model.model.model.layers[0].mlp


@pytest.mark.parametrize("build", [several, mixture, router])
def test_gradients_reach_each_adapter_from_its_samples(build: Callable[[], Any]) -> None:
    model = build()
    block = decoder_layer(model)
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
    for name in ("default", "wide", "few"):
        samples = torch.tensor([n == name for n in NAMES])
        with alone(model, name):
            expected = gradients([name])
        torch.testing.assert_close(mixed["x"][samples], expected.pop("x")[samples], rtol=1e-4, atol=1e-5)
        for key, gradient in expected.items():
            torch.testing.assert_close(mixed[key], gradient, rtol=1e-4, atol=1e-5)
        seen |= {*expected}
    assert seen == {*mixed}
    assert all(any(name in key for key in seen) for name in ("default", "wide", "few"))


GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (several, {}),
        (several, {"num_beams": 3}),
        (several, {"num_beams": 3, "num_return_sequences": 2}),
        (several, {"cache_implementation": "static"}),
        (router, {}),
        (router, {"num_beams": 2}),
    ],
)
def test_generate(build: Callable[[], Any], options: dict[str, Any]) -> None:
    model = build()

    def generate(**more: Any) -> Tensor:
        ids: Tensor = model.generate(input_ids=IDS, attention_mask=MASK, do_sample=False, **GENERATE, **options, **more)
        return ids.unflatten(0, (len(IDS), -1))

    mixed = generate(adapter_names=NAMES)
    answers = of_each_alone(model, generate, NAMES)
    assert not torch.equal(answers["wide"], answers[BASE])
    for sample, name in enumerate(NAMES):
        assert torch.equal(mixed[sample], answers[name][sample])


def test_generate_stacks_adapters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But again in a call after a program has written to one in any way."""
    model = several()
    stacks: list[Any] = []
    stack = integration.stacks.stack_adapters
    monkeypatch.setattr(integration.stacks, "stack_adapters", lambda *args: stacks.append(args) or stack(*args))
    model.generate(input_ids=IDS, adapter_names=NAMES, **GENERATE)
    assert len(stacks) == len(adapted_layers(model))
    before = of_samples(model, NAMES)
    model.base_model.model.model.layers[0].mlp.up_proj.lora_B["wide"].weight.data.mul_(2.0)
    after = of_samples(model, NAMES)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [name != "wide" for name in NAMES]


def test_repeated_names_for_several_samples_of_a_prompt() -> None:
    """PEFT repeats names for beams only, and rejects the rest."""
    model = several()
    options = {"input_ids": IDS, "num_return_sequences": 2, "do_sample": True, "top_k": 1, **GENERATE}
    with pytest.raises(ValueError, match="got 5 and 10"):
        model.generate(adapter_names=NAMES, **options)
    repeated = model.generate(adapter_names=[name for name in NAMES for _ in range(2)], **options)
    expected = model.generate(input_ids=IDS, adapter_names=NAMES, do_sample=False, **GENERATE)
    assert torch.equal(repeated, expected.repeat_interleave(2, 0))


def test_a_failed_call_leaves_nothing_behind() -> None:
    model = several()
    expected = of_samples(model)
    with pytest.raises(ValueError, match="got 4 and 5"):
        of_samples(model, ["wide"] * 4)
    with pytest.raises(ValueError, match="non-existing adapter"):
        of_samples(model, ["wide", "few", "typo", BASE, BASE])
    assert torch.equal(of_samples(model), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_calls_of_other_threads_and_calls_inside_calls_have_their_own_names() -> None:
    model = several()
    model.add_adapter("dense", LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    batches = [["wide"] * 5, None, ["few", BASE, "dense", "one", "few"], ["dense"] * 5]
    expected = [of_samples(model, names) for names in batches]

    def same(i: int) -> bool:
        return torch.equal(of_samples(model, batches[i % 4]), expected[i % 4])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(16)))
    inner: list[bool] = []

    def call(*_: Any) -> None:
        if not inner:
            inner.append(True)
            inner.append(same(1))

    model.base_model.model.model.register_forward_pre_hook(call)
    assert torch.equal(of_samples(model, batches[2]), expected[2])
    assert inner == [True, True]


def test_compiled_code_runs_eagerly() -> None:
    """Dynamo does not notice other names, which are in hooks, and would answer with the adapters of an earlier call."""
    model = several()
    batches = [["wide"] * 5, None, ["few", BASE, "default", "one", "few"], None]
    expected = [of_samples(model, names) for names in batches]
    compiled: list[Any] = []
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend=lambda graph, _: compiled.append(graph) or graph, fullgraph=True)
    assert all(torch.equal(of_samples(model, n), y) for n, y in zip(batches, expected, strict=True))
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


def test_dora_is_rejected() -> None:
    model = adapted()
    model.add_adapter("wide", LoraConfig(init_lora_weights=False, target_modules=["up_proj"], use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        of_samples(model, ["wide", "default", BASE, "wide", "default"])


@pytest.mark.parametrize("build", [several, mixture])
def test_merged_and_merge_aware_adapters_are_rejected(build: Callable[[], Any]) -> None:
    model = build()
    expected = of_samples(model, NAMES)
    model.merge_adapter(["few"])
    with pytest.raises(ValueError, match="adapter_names.*merged adapters.*unmerge_adapter"):
        of_samples(model, NAMES)
    model.unmerge_adapter()
    assert torch.equal(of_samples(model, NAMES), expected)
    integration.set_merge_aware(model, adapter_name="few")
    for chosen in (NAMES, ["few"] * 5):  # also if "default" is active
        with pytest.raises(ValueError, match="adapter_names: expected adapters that are not merge-aware.*got few"):
            of_samples(model, chosen)
    others = [BASE if name == "few" else name for name in NAMES]
    assert torch.equal(of_samples(model, others)[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


def test_methods_without_adapters_per_sample_are_rejected() -> None:
    model = peft.get_peft_model(base(), peft.IA3Config(task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="adapter_names: expected a method with adapters per sample.*got IA3Model"):
        of_samples(model, ["default"] * 5)


def test_wrong_numbers_of_names_are_rejected_if_only_experts_have_adapters() -> None:
    """The experts see tokens only, whose number other numbers of samples may divide too."""
    config = LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    model = draw(get_peft_model(base("mixtral"), config).eval())
    assert IDS.numel() % 2 == 0
    expected = of_samples(model)
    for names in (["default"] * 2, ["default", BASE] * 5):
        with pytest.raises(ValueError, match=f"got {len(names)} and 5"):
            of_samples(model, names)
    assert torch.equal(of_samples(model), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_experts_outside_of_a_block_are_rejected() -> None:
    model = mixture()
    experts = next(m for m in model.modules() if isinstance(m, LoraExperts4bit))
    index, weights = torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1)
    with (
        pytest.raises(
            ValueError, match=r"adapter_names: adapters on \w+_proj need a model that passes them all tokens"
        ),
        model._enable_peft_forward_hooks(adapter_names=["wide"] * 5),
    ):
        experts(torch.randn(10, 64), index, weights)


def test_dropout_has_one_probability() -> None:
    model = mixture()
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
