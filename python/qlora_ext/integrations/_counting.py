"""How many parameters a 4-bit model has, where transformers (``num_parameters``) and PEFT count its elements."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..nn import Embedding4bit, TiedLinear4bit, layers_of


def hidden_parameters(model: nn.Module, embeddings: bool = True) -> int:
    """What ``sum(p.numel() for p in model.parameters())`` misses: the second parameter in each packed byte."""
    hidden = 0
    for _, module in layers_of(model):
        if isinstance(module, TiedLinear4bit) or (isinstance(module, Embedding4bit) and not embeddings):
            continue  # a tied head has no weight of its own
        for name, shape in module.packed_shapes.items():
            hidden += math.prod(shape) - getattr(module, name).numel()
    return hidden


def _register() -> None:
    count = PreTrainedModel.num_parameters

    @functools.wraps(count)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        counted: int = count(self, only_trainable, exclude_embeddings)
        return counted if only_trainable else counted + hidden_parameters(self, not exclude_embeddings)

    PreTrainedModel.num_parameters = num_parameters


_register()
