"""Hooks on the modules of an adapted layer are called as in PEFT; without hooks, the layer is one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import qlora_ext
from qlora_ext.integrations.peft import set_merge_aware

X = torch.randn(3, 64)
MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "base_layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "lora_dropout": lambda layer: layer.lora_dropout["default"],
}


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48)))
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, **options)
    ).base_model.model[0]


def hook(module: nn.Module, kind: str, seen: list[str]) -> Any:
    def called(*args: Any) -> None:
        seen.append(kind)

    return {
        "forward": lambda: module.register_forward_hook(called),
        "forward, kwargs": lambda: module.register_forward_hook(called, with_kwargs=True),
        "forward, always": lambda: module.register_forward_hook(called, always_call=True),
        "before": lambda: module.register_forward_pre_hook(called),
        "before, kwargs": lambda: module.register_forward_pre_hook(called, with_kwargs=True),
        "backward": lambda: module.register_full_backward_hook(called),
        "before backward": lambda: module.register_full_backward_pre_hook(called),
    }[kind]()


KINDS = ["forward", "forward, kwargs", "forward, always", "before", "before, kwargs", "backward", "before backward"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", MODULES)
def test_hooks_are_called(module: str, kind: str) -> None:
    layer, seen = adapted(), []
    fused = layer(X)
    handle = hook(MODULES[module](layer), kind, seen)
    y = layer(X.clone().requires_grad_())
    y.sum().backward()
    assert seen == [kind]
    assert (y - fused).norm() < 1e-5 * fused.norm()
    handle.remove()
    assert torch.equal(layer(X), fused)
    assert seen == [kind]


def test_hooks_can_change_results() -> None:
    layer = adapted()
    layer.lora_B["default"].register_forward_hook(lambda module, args, y: torch.zeros_like(y))
    assert torch.equal(layer(X), layer.base_layer(X))


def test_hooks_of_all_modules_are_called() -> None:
    layer, seen = adapted(), []
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module) and None)
    layer(X)
    handle.remove()
    assert {id(m) for m in seen} >= {id(get(layer)) for get in MODULES.values()}


@pytest.mark.parametrize("module", MODULES)
def test_a_forward_of_an_instance_is_called(module: str) -> None:
    layer, seen = adapted(), []
    replaced = MODULES[module](layer)
    original = replaced.forward
    replaced.forward = lambda *args: seen.append(module) or original(*args)  # type: ignore[method-assign]
    layer(X)
    assert seen == [module]


def test_parametrizations_and_other_modules_run_as_they_are() -> None:
    layer = adapted()

    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    nn.utils.parametrize.register_parametrization(layer.lora_B["default"], "weight", Doubled())
    expected = layer.base_layer(X) + 2 * (adapted()(X) - layer.base_layer(X))
    assert (layer(X) - expected).norm() < 1e-5 * expected.norm()

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    layer = adapted()
    layer.lora_dropout["default"] = Silent()
    assert torch.equal(layer(X), layer.base_layer(X))


def test_a_layer_that_runs_as_merged_has_no_modules_to_hook() -> None:
    layer = adapted()
    model = nn.Sequential(layer)
    model.peft_config = {"default": peft.LoraConfig()}  # type: ignore[assignment]
    set_merge_aware(model)
    layer(X)
    layer.lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="without hooks"):
        layer(X)


def test_compiled_layers_call_hooks_and_stay_one_graph_without() -> None:
    layer, seen = adapted(), []
    fused = layer(X)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), fused)
    layer.base_layer.register_forward_hook(lambda *args: seen.append(1) and None)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    assert (compiled(X) - fused).norm() < 1e-5 * fused.norm()
    assert seen
