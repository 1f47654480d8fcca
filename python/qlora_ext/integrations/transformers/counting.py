"""How many parameters a 4-bit model has, where transformers (``num_parameters``) and PEFT count its elements."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ...nn import Embedding4bit, TiedLinear4bit, layers_of, scale_names
from .._patches import extend


def hidden_parameters(model: nn.Module, embeddings: bool = True) -> int:
    """By how much ``sum(p.numel() for p in model.parameters())`` is short of a 4-bit model's size.

    It misses the second element in each packed byte, and counts the scales. Without ``embeddings`` it did not count
    their weights.
    """
    hidden = 0
    for _, module in layers_of(model):
        if isinstance(module, TiedLinear4bit):
            continue  # no weight of its own
        counted = embeddings or not isinstance(module, Embedding4bit)
        for name, shape in module.packed_shapes.items():
            absmax = module._parameters.get(scale_names(name)["absmax"])
            if absmax is not None:  # where bitsandbytes is taken over, it is a buffer
                hidden -= absmax.numel()
            if counted:
                hidden += math.prod(shape) - getattr(module, name).numel()
    return hidden


@extend("transformers.modeling_utils:PreTrainedModel.num_parameters")
def num_parameters(original: Any, self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    counted: int = original(self, only_trainable, exclude_embeddings)
    return counted if only_trainable else counted + hidden_parameters(self, not exclude_embeddings)
