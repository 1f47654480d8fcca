"""Makes the parameter counts of transformers (``num_parameters``) and PEFT, and ``dtype``, correct for 4-bit models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...nn import Embedding4bit, Packed4bit, TiedLinear4bit, layers_of, scale_names
from ...nn.dense_16bit import Dense16bit
from .._patches import extend


def uncounted_parameters(model: nn.Module, embeddings: bool = True) -> int:
    """The number of parameters that ``sum(p.numel() for p in model.parameters())`` misses in a 4-bit model.

    The sum misses the second element of each packed byte, and counts the scales.

    Args:
        embeddings: False if the sum excludes the weights of embeddings.
    """
    uncounted = 0
    for _, module in layers_of(model):
        if isinstance(module, TiedLinear4bit):
            continue  # it has no weight of its own
        counted = embeddings or not isinstance(module, Embedding4bit)
        for name, shape in module.packed_shapes.items():
            absmax = module._parameters.get(scale_names(name)["absmax"])
            if absmax is not None:  # in layers that replace bitsandbytes', it is a buffer
                uncounted -= absmax.numel()
            if counted:
                uncounted += math.prod(shape) - getattr(module, name).numel()
    return uncounted


@extend("transformers.modeling_utils:PreTrainedModel.num_parameters")
def num_parameters(original: Any, self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    counted: int = original(self, only_trainable, exclude_embeddings)
    return counted if only_trainable else counted + uncounted_parameters(self, not exclude_embeddings)


@extend("transformers.modeling_utils:PreTrainedModel.dtype")
def dtype(original: Any, self: Any) -> torch.dtype:
    for module in self.modules():
        stored = [*module.packed_state()] if isinstance(module, Packed4bit) else []
        if isinstance(module, Dense16bit):  # the model may compute in another dtype
            stored = ["weight"]
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point() and name not in stored:
                found: torch.dtype = p.dtype
                return found
    fallback: torch.dtype = original(self)
    return fallback
