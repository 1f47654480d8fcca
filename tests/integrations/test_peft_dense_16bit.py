"""Adapters on dense layers that keep 16-bit weights in a float32 model: those of a model that is cast to float32."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from qlora_app.models.adapter_files import load
from qlora_ext import quantize_model
from qlora_ext.integrations.peft import merge_to_4bit
from qlora_ext.nn import Embedding16bit, Linear16bit, set_compute_dtype
from qlora_ext.nn.dense_16bit import multiply_in_float32
from tiny_models import make, token_ids

IDS = token_ids()
SKIP = ("lm_head", "v_proj")
DENSE = ["lm_head", "embed_tokens", "v_proj"]
TARGETS = [*DENSE, "q_proj"]


def stored(family: str = "llama") -> Any:
    """A 4-bit model that computes in float32, and keeps 16-bit weights in its embeddings, head and v_proj."""
    return set_compute_dtype(quantize_model(make(family), skip=SKIP), torch.float32)


def cast(family: str = "llama") -> Any:
    return quantize_model(make(family), skip=SKIP).to(torch.float32)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, "init_lora_weights": False} | options
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {
        key.replace(f".{name}", ""): t for key, t in model.state_dict().items() if ".lora_" in key and f".{name}" in key
    }


def layers_with_adapters(model: Any) -> list[Any]:
    modules = model.base_model.model
    wrapped = modules.lm_head, modules.model.embed_tokens, *(layer.self_attn.v_proj for layer in modules.model.layers)
    return [layer.get_base_layer() for layer in wrapped]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("adapter")
    get_peft_model(stored(), lora()).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_memory", [True, False])
def test_adapters_load_in_float32(saved: pathlib.Path, low_memory: bool, autocast: bool) -> None:
    options: Any = {"low_cpu_mem_usage": low_memory, "autocast_adapter_dtype": autocast}
    expected = adapters_of(PeftModel.from_pretrained(cast(), saved))
    model = PeftModel.from_pretrained(stored(), saved, **options)
    model.load_adapter(saved, "second", **options)
    model.add_adapter("new", lora(), **options)
    for found in (adapters_of(model), adapters_of(model, "second")):
        assert found.keys() == expected.keys()
        assert all(t.dtype == torch.float32 and torch.equal(t, expected[name]) for name, t in found.items())
    assert {t.dtype for t in adapters_of(model, "new").values()} == {torch.float32}
    assert model.get_base_model().lm_head.base_layer.weight.dtype == torch.bfloat16
    assert {t.dtype for t in adapters_of(get_peft_model(stored(), lora(), **options)).values()} == {torch.float32}


def test_adapters_that_the_command_and_transformers_load(saved: pathlib.Path) -> None:
    expected = logits(PeftModel.from_pretrained(cast(), saved))
    model = stored()
    model.load_adapter(str(saved), "default")
    for adapted in (model, load(stored(), saved, force=True)):
        assert {t.dtype for t in adapters_of(adapted).values()} == {torch.float32}
        assert_close(logits(adapted), expected)


@pytest.mark.parametrize("low_memory", [True, False])
def test_loaded_adapters_are_not_rounded_and_retain_the_base(saved: pathlib.Path, low_memory: bool) -> None:
    """The file has the bfloat16 weights of the head and the embeddings too."""
    expected = adapters_of(PeftModel.from_pretrained(cast(), saved))
    for dtype in (torch.bfloat16, torch.float32):
        base = quantize_model(make("llama"), skip=SKIP).to(dtype)
        base.lm_head.weight = base.model.embed_tokens.weight
        model = PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=low_memory)
        found = adapters_of(model)
        assert all(torch.equal(t, expected[name]) for name, t in found.items())
        assert base.lm_head.base_layer.weight is base.model.embed_tokens.base_layer.weight
        assert base.lm_head.base_layer.weight.dtype == dtype
        logits(model)


def test_a_head_that_is_saved_in_full_loads_in_float32(tmp_path: pathlib.Path) -> None:
    model = get_peft_model(stored(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    torch.nn.init.normal_(trained)
    model.save_pretrained(tmp_path)
    loaded = load(stored(), tmp_path, force=True).base_model.model.lm_head
    assert torch.equal(loaded.modules_to_save["default"].weight, trained)
    assert loaded.original_module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gemma2", "xglm"])  # the scale is a tensor, or a float
def test_adapters_on_an_embedding_with_a_scale(family: str) -> None:
    adapted = []
    for base in (cast(family), stored(family)):
        torch.manual_seed(0)
        adapted.append(get_peft_model(base, lora(target_modules=["embed_tokens"])))
    expected = logits(adapted[0])
    assert_close(logits(adapted[1]), expected)
    adapted[1].merge_adapter()
    assert_close(logits(adapted[1]), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["lora", "dora", "safe", "two"])
def test_merged_weights_are_float32_and_unmerging_restores_the_bits(family: str, kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(stored(family), lora(target_modules=DENSE, use_dora=kind == "dora"))
    if kind == "two":
        model.add_adapter("second", lora(target_modules=DENSE))
        model.base_model.set_adapter(["default", "second"])
    before, unmerged = {name: t.clone() for name, t in model.state_dict().items()}, logits(model)
    layers = layers_with_adapters(model)
    for adapter in model.active_adapters:
        model.merge_adapter([adapter], safe_merge=kind == "safe")
    assert {layer.weight.dtype for layer in layers} == {torch.float32}
    assert_close(logits(model), unmerged)
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(t.dtype == before[name].dtype and torch.equal(t, before[name]) for name, t in after.items())
    assert len({layer.weight for layer in layers}) == len(layers) - (family == "qwen2")  # still tied
    assert torch.equal(logits(model), unmerged)


def test_an_adapter_with_nan_changes_nothing() -> None:
    model = get_peft_model(stored(), lora(target_modules=DENSE))
    (layer,) = {m for m in model.modules() if isinstance(m, Linear16bit) and m.out_features == 128}
    head = model.base_model.model.lm_head
    head.lora_B["default"].weight.data[0] = float("nan")
    weight = layer.weight
    with pytest.raises(ValueError, match="NaNs detected"):
        head.merge(safe_merge=True)
    assert layer.weight is weight


def test_merge_and_unload_gives_dense_layers_with_the_whole_sum(saved: pathlib.Path) -> None:
    model = get_peft_model(stored(), lora(target_modules=DENSE))
    torch.manual_seed(0)
    head = model.base_model.model.lm_head
    expected = head.base_layer.weight.float() + head.get_delta_weight("default")
    unmerged = logits(model)
    merged, _ = merge_to_4bit(copy.deepcopy(model))
    assert torch.equal(merged.lm_head.weight, expected)
    assert_close(logits(merged), unmerged)
    dense = model.merge_and_unload()
    assert torch.equal(dense.lm_head.weight, expected)
    assert type(dense.lm_head) is nn.Linear
    assert type(dense.get_input_embeddings()) is nn.Embedding
    assert not any(isinstance(m, Linear16bit | Embedding16bit) for m in dense.modules())


def test_a_bfloat16_model_merges_as_peft_does() -> None:
    """Also if its head multiplies in float32: the merged model does not depend on the processor."""
    torch.manual_seed(0)
    model = get_peft_model(quantize_model(make(), skip=SKIP), lora(target_modules=DENSE))
    other = copy.deepcopy(model)
    multiply_in_float32(other.get_base_model())
    layers = layers_with_adapters(other)
    assert Linear16bit in {type(layer) for layer in layers}
    for each in (model, other):
        each.merge_adapter()
    for layer, ours in zip(layers_with_adapters(model), layers, strict=True):
        assert ours.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, ours.weight)


# Adapters that read or write the weight of their base.
READING: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "tokens": {"trainable_token_indices": [5, 7]},
    "parameter": {"target_modules": ["v_proj"], "target_parameters": ["lm_head.weight"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "OFT": {"init_weights": False, "oft_block_size": 4},
    "LoHa": {"init_weights": False},
    "HRA": {"init_weights": False},
    "IA3": {"init_ia3_weights": False, "feedforward_modules": ["v_proj"]},
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", READING)
def test_adapters_that_read_or_write_the_weight(kind: str, family: str) -> None:
    """They are those of a model that is cast to float32, before and after a step, and merged."""
    options = {"task_type": "CAUSAL_LM", "target_modules": ["lm_head", "v_proj"]} | READING[kind]
    config = getattr(peft, f"{kind}Config")(**options) if kind[0].isupper() else lora(**options)
    results = []
    for base in (stored(family), cast(family)):
        torch.manual_seed(1)
        model = get_peft_model(base, copy.deepcopy(config))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    assert p.dtype == torch.float32
                    p.add_(torch.randn_like(p) * 1e-3)
        first = logits(model)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((first, *gradients, logits(model.merge_and_unload().float())))
    assert len(results[0]) == len(results[1]) > 2
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)
