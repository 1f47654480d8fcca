"""4-bit layers that multiply in bfloat16 inside a model that computes in float32."""

from __future__ import annotations

import torch
from torch import nn

from .embedding import Embedding4bit, TiedLinear4bit
from .packed import layers_of


def multiply_in_bfloat16(model: nn.Module) -> None:
    """Makes the 4-bit layers of a model that computes in float32 multiply in bfloat16.

    Between layers, values stay in float32. So do quantized embeddings with the heads that are tied to them, and layers
    whose weights integer products do not serve: those with blocks of 16 elements, and those with offsets and other
    codes than integers. A later ``model.float()`` undoes it.

    Example:
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48)))
        >>> qlora_ext.nn.multiply_in_bfloat16(model)
        >>> model[0].compute_dtype, model(torch.randn(3, 64)).dtype
        (torch.bfloat16, torch.float32)
    """
    for _, layer in layers_of(model):
        is_served = layer.block_size >= 32 and (layer.form.offsets is None or layer.form.code in ("int4", "uint4"))
        if is_served and not isinstance(layer, Embedding4bit | TiedLinear4bit):
            layer.compute_dtype = torch.bfloat16
