"""PEFT's other methods over 4-bit layers: the results of decoded layers, merging, initializations, counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, quantize_model
from tensors import error
from tiny_models import FAMILIES, logits, make, token_ids

IDS = token_ids()
TARGETS = ["q_proj", "up_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "AdaLora": {"init_lora_weights": False, "total_step": 10},
    "IA3": {"init_ia3_weights": False, "feedforward_modules": ["up_proj"]},
    "Vera": {"init_weights": False, "r": 4},
    "RandLora": {"init_weights": False, "r": 4},
    "Road": {"init_weights": False},
    "OFT": {"init_weights": False, "oft_block_size": 4},
    "BOFT": {"init_weights": False, "boft_block_size": 4},
    "Miss": {"init_weights": False, "r": 4},
    "Shira": {"init_weights": False, "r": 2, "random_seed": 1},
    "LoHa": {"init_weights": False},
    "HRA": {"init_weights": False},
    "FourierFT": {"init_weights": False, "n_frequency": 50},
    "Hira": {"init_weights": False},
    "Delora": {"init_weights": False},
}


def base(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return quantize_model(make(family, dtype))


@pytest.mark.parametrize("method", METHODS)
def test_methods_compute_train_and_merge_as_over_decoded_layers(method: str) -> None:
    config_class = getattr(peft, f"{method}Config", None)
    if config_class is None:
        pytest.skip(f"PEFT {peft.__version__} has no {method}")
    config = config_class(task_type="CAUSAL_LM", target_modules=TARGETS, **METHODS[method])
    torch.manual_seed(1)
    theirs = get_peft_model(base().dequantize(), copy.deepcopy(config)).eval()
    torch.manual_seed(1)
    ours = get_peft_model(base(), config).eval()
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in ours.named_parameters() if p.requires_grad}
    frozen = {name for name in theirs.state_dict() if name.startswith("base_model.vera") or "randlora" in name}
    adapter = {name: t for name, t in theirs.state_dict().items() if name in trained | frozen}
    assert not ours.load_state_dict(adapter, strict=False).unexpected_keys
    assert all(getattr(status, "quantization_backend", "4bit") for status in peft.get_layer_status(ours))
    expected = logits(theirs)
    assert error(logits(base()), expected) > 0.01
    assert error(logits(ours), expected) < 1e-5

    packed = {name: t.clone() for name, t in ours.state_dict().items() if t.dtype == torch.uint8}
    ours.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    ours.eval()
    ours.merge_adapter()
    merged = logits(ours)
    assert 1e-3 < error(merged, expected) < 0.7  # the merged weights are quantized again
    ours.unmerge_adapter()
    state = ours.state_dict()
    assert packed
    assert all(torch.equal(state[name], t) for name, t in packed.items())
    dense = ours.merge_and_unload()
    assert not any(isinstance(m, Linear4bit) for m in dense.modules())
    assert error(logits(dense), expected) < 1e-5


@pytest.mark.parametrize("method", [*METHODS, "Lora", "TinyLora", "OSF"])
def test_adapters_start_as_over_decoded_layers(method: str) -> None:
    """Also a second one, and in the dtype of the base if PEFT is told not to cast them."""
    config_class = getattr(peft, f"{method}Config", None)
    if config_class is None:
        pytest.skip(f"PEFT {peft.__version__} has no {method}")
    options = METHODS.get(method, {"use_dora": True} if method == "Lora" else {})

    def start(model: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
        torch.manual_seed(1)
        first, second = (config_class(target_modules=TARGETS, **options) for _ in range(2))
        model = get_peft_model(model, first, "first", autocast_adapter_dtype=False).eval()
        outputs = [logits(model)]
        if method != "AdaLora":  # PEFT has one of these to train
            model.add_adapter("second", second, autocast_adapter_dtype=False)
            model.set_adapter("second")
            outputs.append(logits(model.eval()))
        return {name: p for name, p in model.named_parameters() if {"first", "second"} & {*name.split(".")}}, outputs

    (expected, theirs), (ours, found) = (
        start(base(dtype=torch.bfloat16).dequantize()),
        start(base(dtype=torch.bfloat16)),
    )
    assert {p.dtype for p in ours.values()} == {torch.bfloat16}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in ours.items())
    assert [y.dtype for y in found] == [y.dtype for y in theirs]
    assert all(error(*pair) < 0.03 for pair in zip(found, theirs, strict=True))


def test_a_method_without_a_base_layer_is_refused() -> None:
    class Method(peft.IA3Model):  # type: ignore[name-defined]
        def _create_and_replace(
            self, config: Any, name: str, target: Any, target_name: str, parent: Any, **_: Any
        ) -> None:
            setattr(parent, target_name, torch.nn.Identity())

    model = base()
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(TypeError, match=r"Method cannot train over 4-bit layers \(up_proj\)"):
        Method(model, peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[]), "default")
    assert model.model.layers[0].mlp.up_proj is layer


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_loads_adapters_with_low_memory(options: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(target_modules=TARGETS, init_lora_weights=False, **options)
    model = get_peft_model(base(), config).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_pissa_moves_a_part_of_the_base_into_the_adapter() -> None:
    plain = base()
    start = get_peft_model(base(), LoraConfig(target_modules=["up_proj"], r=8, init_lora_weights="pissa"))
    for i, layer in enumerate(m for m in start.modules() if hasattr(m, "lora_A")):
        w = plain.model.layers[i].mlp.up_proj.dequantize()
        moved = layer.get_delta_weight("default").detach()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        torch.testing.assert_close(moved, u[:, :8] * s[:8] @ vh[:8], rtol=1e-3, atol=1e-5)
        residual = w - moved
        quantized = layer.base_layer.dequantize()
        assert error(quantized, residual) < 0.12  # quantized again, the base is the residual of W
        assert error(quantized + moved, w) < 0.12 * (residual.norm() / w.norm()).item()


def test_loftq_on_a_4bit_base_says_how() -> None:
    config = LoraConfig()
    config.init_lora_weights = "loftq"  # without it, PEFT would need scipy
    with pytest.raises(ValueError, match="replace_lora_weights_loftq"):
        get_peft_model(base(), config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_gives_the_residual_to_the_adapter(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = make(family, torch.float32)
    dense.save_pretrained(tmp_path)
    four_bit = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QLoRAConfig())
    before = error(logits(four_bit), logits(dense))
    config = LoraConfig(r=16, lora_alpha=64, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    model = get_peft_model(four_bit, config).eval()
    peft.replace_lora_weights_loftq(model, model_path=str(tmp_path / "model.safetensors"))
    assert error(logits(model), logits(dense)) < 0.8 * before
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            w = dense.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
            w = w.T if family == "gpt2" else w
            left = w - layer.base_layer.dequantize()
            spectrum = torch.linalg.svdvals(left)
            rest = (left - layer.get_delta_weight("default")).norm()
            torch.testing.assert_close(rest, spectrum[16:].norm(), rtol=1e-3, atol=1e-6)

    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    peft.replace_lora_weights_loftq(
        model, model_path=str(tmp_path / "model.safetensors"), callback=lambda model, name: False
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_every_parameter(family: str) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    dense, four_bit = make(family), base(family, torch.bfloat16)
    assert four_bit.num_parameters() == dense.num_parameters()
    assert four_bit.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    theirs, ours = get_peft_model(dense, copy.deepcopy(config)), get_peft_model(four_bit, config)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    mixed = peft.PeftMixedModel
    assert mixed(base(family), copy.deepcopy(config)).get_nb_trainable_parameters()[1] > 0


def test_lora_plus_trains(tmp_path: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear"))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable) > 0
    assert all(rates[id(p)] == (2e-3 * 16 if "lora_B" in name else 2e-3) for name, p in trainable.items())
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


MIXED = {
    "lora": lambda targets: LoraConfig(target_modules=targets, init_lora_weights=False),
    "loha": lambda targets: peft.LoHaConfig(target_modules=targets, init_weights=False),
    "lokr": lambda targets: peft.LoKrConfig(target_modules=targets, init_weights=False),
    "adalora": lambda targets: peft.AdaLoraConfig(target_modules=targets, init_lora_weights=False, total_step=10),
}


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in MIXED for b in MIXED if a != b])
def test_mixed_methods_have_layers_of_their_own(first: str, second: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(base(), MIXED[first](["q_proj"]), "first", mixed=True)
    model.add_adapter("second", MIXED[second](["up_proj"]))
    model.set_adapter(["first", "second"])
    both = logits(model.eval())
    model.set_adapter("first")
    assert error(logits(model), both) > 1e-3
    model.set_adapter(["first", "second"])
    twin = get_peft_model(base().dequantize(), MIXED[first](["q_proj"]), "first", mixed=True)
    twin.add_adapter("second", MIXED[second](["up_proj"]))
    twin.set_adapter(["first", "second"])
    adapters = {name: p for name, p in model.named_parameters() if p.is_floating_point() and "base_layer" not in name}
    assert not twin.load_state_dict(adapters, strict=False).unexpected_keys
    assert error(both, logits(twin.eval())) < 1e-5
    merged = model.merge_and_unload()
    assert not any(isinstance(m, Linear4bit) for m in merged.modules())
    assert error(logits(merged), both) < 1e-5

    model = get_peft_model(base(), MIXED[first](["q_proj"]), "first", mixed=True)
    with pytest.raises(ValueError, match=r"q_proj is a 4-bit layer with adapters of \w+ and cannot also have \w+"):
        model.add_adapter("second", MIXED[second](["q_proj"]))


@pytest.mark.parametrize("method", MIXED)
def test_a_second_adapter_of_a_method_is_no_mixture(method: str) -> None:
    model = get_peft_model(base(), MIXED[method](["q_proj"]), "first", mixed=True)
    if method != "adalora":  # PEFT has one of these to train
        model.add_adapter("second", MIXED[method](["q_proj", "up_proj"]))
        model.set_adapter(["first", "second"])
    assert logits(model.eval()).isfinite().all()
