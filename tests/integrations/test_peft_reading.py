"""PEFT's methods and utilities that read base weights get decoded weights, and give the same results as dense ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qlora_ext
from qlora_ext.nn import Linear4bit, layers_of
from tiny_models import make, token_ids

IDS = token_ids()
TARGETS = ["q_proj", "v_proj", "gate_proj"]


def bases() -> tuple[Any, Any]:
    """The same weights in 4 bits and dense."""
    packed = qlora_ext.quantize_model(make("llama", torch.float32))
    dense = make("llama", torch.float32)
    for name, layer in layers_of(packed):
        dense.get_submodule(name).weight.data = layer.dequantize()  # type: ignore[operator]
    return packed, dense


def config_of(method: str, **options: Any) -> Any:
    found = getattr(peft, f"{method}Config", None)
    if found is None:
        pytest.skip(f"this PEFT has no {method}")
    return found(target_modules=TARGETS, **options)


def adapted(base: Any, config: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    return model


def assert_near(found: Any, expected: Any) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-9


def trained(model: Any) -> list[Tensor]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.abs().sum() > 0 for g in gradients)
    return [loss.detach(), *gradients]


@pytest.mark.parametrize(("method", "options"), [("UniLora", {"r": 4}), ("Frod", {})])
def test_gradients_are_those_over_dense_weights(method: str, options: dict[str, Any]) -> None:
    outcomes = []
    for base in bases():
        torch.manual_seed(1)
        outcomes.append(trained(get_peft_model(base, config_of(method, **options))))
    assert_near(*outcomes)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("LoKr", {"r": 4}),
        ("LoHa", {"r": 4}),
        ("UniLora", {"r": 4}),
        ("Miss", {"r": 4, "init_weights": "bat"}),
        ("Lora", {"r": 4, "init_lora_weights": False}),
    ],
)
def test_adapters_become_lora(method: str, options: dict[str, Any]) -> None:
    if not hasattr(peft, "convert_to_lora"):
        pytest.skip("this PEFT has no convert_to_lora")
    if method == "Miss" and not hasattr(peft.tuners.lora.conversion, "_convert_miss_module_to_lora"):
        pytest.skip("this PEFT does not convert MiSS, over dense layers either")
    outcomes = []
    for base in bases():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LoRA that is converted to LoRA
            config, weights = peft.convert_to_lora(adapted(base, config_of(method, **options)), 32)
        names = sorted(name.removesuffix(".lora_A.weight") for name in weights if "lora_A" in name)
        outcomes.append([weights[f"{n}.lora_B.weight"] @ weights[f"{n}.lora_A.weight"] for n in names])
        assert config.target_modules
    assert_near(*outcomes)


def test_intruders_are_found_in_the_decoded_weights() -> None:
    intruders = pytest.importorskip(
        "peft.tuners.lora.intruders", reason="this PEFT does not search for intruder dimensions"
    )
    outcomes = []
    for base in bases():
        model = adapted(base, config_of("Lora", r=4, init_lora_weights=False))
        intruders.reduce_intruder_dimension(model, logging_sink=None)
        outcomes.append([model(input_ids=IDS).logits])
        assert model.active_adapter == "intruder_reduced"
    assert_near(*outcomes)
    assert all(type(m) is Linear4bit for _, m in layers_of(bases()[0]))


def test_cast_mixed_precision_params_keeps_the_bits() -> None:
    packed, dense = bases()
    outcomes = []
    for base in (packed, dense):
        model = adapted(base, config_of("Lora", r=4))
        before = {name: layer.weight4bit for name, layer in layers_of(model)}
        peft.cast_mixed_precision_params(model, torch.bfloat16)
        for name, layer in layers_of(model):
            assert layer.weight.dtype == layer.weight_dtype == torch.bfloat16
            assert all(torch.equal(t, before[name].tensors[key]) for key, t in layer.weight.tensors.items())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            outcomes.append(trained(model))
    (loss, *_), (expected, *_) = outcomes
    assert abs(loss - expected) < 0.01 * expected


def test_corda_prepares_and_initializes() -> None:
    corda = pytest.importorskip("peft.tuners.lora.corda", reason="CorDA needs attrs", exc_type=ImportError)
    outcomes = []
    for base in bases():
        config = config_of(
            "Lora", r=4, init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm")
        )
        torch.manual_seed(1)
        corda.preprocess_corda(base, config, run_model=lambda base=base: base(input_ids=token_ids(1, 256)))
        model = get_peft_model(base, config)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        outcomes.append([layer.get_delta_weight("default").detach()])
    assert_near(*outcomes)


def test_lora_ga_is_rejected() -> None:
    if not hasattr(peft, "preprocess_loraga"):
        pytest.skip("this PEFT has no LoRA-GA")
    config = config_of("Lora", init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    packed, dense = bases()
    with pytest.raises(RuntimeError, match="requires_grad.*a 4-bit weight is frozen; train an adapter"):
        peft.preprocess_loraga(packed, config, lambda: None)
    peft.preprocess_loraga(dense, config, lambda: dense(input_ids=IDS, labels=IDS).loss.backward())


def test_weights_of_streamed_layers_are_read(tmp_path: Path) -> None:
    if not hasattr(peft, "convert_to_lora"):
        pytest.skip("this PEFT has no convert_to_lora")
    packed, dense = bases()
    packed.save_pretrained(tmp_path)
    streamed = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=qlora_ext.QLoRAConfig(stream="disk")
    )
    for name, layer in layers_of(streamed):
        assert layer.residency is not None
        assert torch.equal(2 * layer.weight, 2 * dense.get_submodule(name).weight)
    outcomes = []
    for base in (streamed, dense):
        _, weights = peft.convert_to_lora(adapted(base, config_of("LoKr", r=4)), 32)
        names = sorted(name.removesuffix(".lora_A.weight") for name in weights if "lora_A" in name)
        outcomes.append([weights[f"{n}.lora_B.weight"] @ weights[f"{n}.lora_A.weight"] for n in names])
    assert_near(*outcomes)


def test_an_adapter_on_an_offloaded_layer_is_not_trained(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    qlora_ext.quantize_model(make("llama", torch.float32)).save_pretrained(tmp_path / "saved")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        dtype=torch.float32,
        device_map={**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    expected = qlora_ext.quantize_model(make("llama", torch.float32))(input_ids=IDS).logits
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
    model = get_peft_model(model, config_of("Lora", r=4))
    with pytest.raises(ValueError, match=r'device_map: .*layers? that is offloaded.*QLoRAConfig\(stream="disk"\)'):
        model(input_ids=IDS, labels=IDS)
