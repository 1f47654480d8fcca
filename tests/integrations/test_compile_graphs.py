"""A model with LoRA compiles to one graph, also with dropout, experts and hot-swapping."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor

from adapted_models import LINEAR, ON_EXPERTS, draw
from graphs import CountingBackend, largest_error
from qlora_ext.nn import quantize_model
from test_compile_models import language_step
from tiny_models import logits, make, token_ids

IDS = token_ids(2, 6)
MODELS = {
    "llama": (lambda: make("llama", torch.float32), LINEAR),
    "mixtral": (lambda: make("mixtral", torch.float32), LINEAR),
    "qwen3_moe": (
        lambda: make("qwen3_moe", torch.float32),
        ON_EXPERTS,
    ),
}


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


def adapted(name: str, **options: Any) -> Any:
    build, targets = MODELS[name]
    torch.manual_seed(2)
    return draw(get_peft_model(quantize_model(build()), LoraConfig(**{"r": 4, **targets, **options})))


@pytest.mark.parametrize("name", MODELS)
def test_dropout_breaks_no_graph(name: str) -> None:
    model, backend = adapted(name, lora_dropout=0.1).train(), CountingBackend()
    compiled = torch.compile(model, backend=backend)  # graph breaks are allowed, as in the Trainer
    assert largest_error(language_step(model, compiled, IDS), language_step(model, model, IDS)) < 1e-5
    assert (backend.forward, backend.backward) == (1, 1)
    explained = torch._dynamo.explain(model)(input_ids=IDS, labels=IDS, use_cache=False)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    first, second = (compiled(input_ids=IDS, use_cache=False).logits for _ in range(2))
    assert not torch.equal(first, second)  # each call draws its own masks


def outputs(model: Any) -> Tensor:
    return logits(model, IDS, use_cache=False)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_compiled_model_swaps_adapters_without_compiling_anew(name: str, tmp_path: pathlib.Path) -> None:
    # PEFT pads only adapters of linear layers to a common rank.
    ranks = {"first": 4, "second": 4 if name == "qwen3_moe" else 7}
    expected = {}
    for adapter, rank in ranks.items():
        build, targets = MODELS[name]
        torch.manual_seed(rank)
        config = LoraConfig(**targets | {"r": rank, "lora_alpha": rank * (2 if adapter == "first" else 5)})
        model = draw(get_peft_model(quantize_model(build()), config)).eval()
        expected[adapter] = outputs(model)
        model.save_pretrained(tmp_path / adapter)

    model = PeftModel.from_pretrained(quantize_model(MODELS[name][0]()), tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=max(ranks.values()), config=model.peft_config)
    assert all(isinstance(m.scaling["default"], Tensor) for m in model.modules() if hasattr(m, "lora_A"))
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(outputs(compiled), expected["first"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(model), expected["first"], rtol=1e-4, atol=1e-5)  # also uncompiled
    graphs = backend.forward
    with torch._dynamo.config.patch(error_on_recompile=True):
        for adapter in ("second", "first", "second"):
            hotswap_adapter(model, tmp_path / adapter, adapter_name="default")
            torch.testing.assert_close(outputs(compiled), expected[adapter], rtol=1e-4, atol=1e-5)
    assert backend.forward == graphs == 1
    assert not torch.allclose(expected["first"], expected["second"], atol=1e-2)


def test_a_tensor_as_scaling_trains_as_its_number() -> None:
    gradients = []
    for tensor in (False, True):
        model = adapted("llama", lora_alpha=12).train()
        if tensor:
            prepare_model_for_compiled_hotswap(model)
        gradients.append(language_step(model, model, IDS))
    assert largest_error(*gradients) < 1e-5
