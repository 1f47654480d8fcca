"""Adapters on parameters (``target_parameters``) of layers that are no experts: several, and one per sample."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from adapted_models import BASE, add_adapter, alone, draw
from qlora_ext.nn import quantize_model


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
    add_adapter(model, "wide", LoraConfig(r=5, **parameters))
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
    add_adapter(model, "wide", LoraConfig(r=5, **parameters))
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
