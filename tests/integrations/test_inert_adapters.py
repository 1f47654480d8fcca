"""Adapters without a gradient in the first step are reported by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_ext.integrations.peft import inert_adapters
from qlora_ext.nn import quantize_model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.detached, self.forgotten = (nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.used(x) + self.detached(x).detach())
        return y.square().mean()


def adapted(**options: Any) -> Any:
    model = quantize_model(Model(), skip=["head"])
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["used", "detached", "forgotten"], **options))


def test_layers_that_learn_nothing_are_named() -> None:
    model = adapted()
    model(torch.randn(3, 64)).backward()
    assert inert_adapters(model) == ["base_model.model.detached", "base_model.model.forgotten"]


def test_dense_parameters_that_are_trained_are_looked_at_too() -> None:
    model = adapted(modules_to_save=["head"])
    model(torch.randn(3, 64)).backward()
    assert not any("head" in name for name in inert_adapters(model))
    model.zero_grad()
    assert any("head" in name for name in inert_adapters(model))
    assert "base_model.model.used" in inert_adapters(model)


def test_finetuning_reports_them_once() -> None:
    training = pytest.importorskip("qlora_app.training.trainer", reason="the command needs transformers")
    printed: list[str] = []
    callback = training.NameInertAdapters(printed.append)
    model = adapted()
    model(torch.randn(3, 64)).backward()
    for _ in range(2):
        callback.on_pre_optimizer_step(None, None, None, model=model)
    assert printed == [
        "no gradient in the first step: these adapters learn nothing: "
        "base_model.model.detached, base_model.model.forgotten"
    ]
