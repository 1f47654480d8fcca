"""How many parameters a 4-bit model has, where transformers (``num_parameters``) and PEFT count its elements."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..nn import Linear4bit


def hidden_parameters(model: nn.Module) -> int:
    """What ``sum(p.numel() for p in model.parameters())`` misses: the second parameter in each packed byte."""
    layers = (m for m in model.modules() if isinstance(m, Linear4bit))
    return sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in layers)


def _register() -> None:
    count = PreTrainedModel.num_parameters

    @functools.wraps(count)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        counted: int = count(self, only_trainable, exclude_embeddings)
        return counted if only_trainable else counted + hidden_parameters(self)

    PreTrainedModel.num_parameters = num_parameters


_register()
