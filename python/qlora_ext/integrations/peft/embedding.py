"""PEFT's LoRA over an ``Embedding4bit``."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Embedding as DenseLoraEmbedding
from torch import Tensor, nn

from ...merging.layers import Over4bit
from ...nn import Embedding4bit


class LoraEmbedding4bit(Over4bit, DenseLoraEmbedding):
    """PEFT's LoRA over an ``Embedding4bit``. Only code that writes to the table differs from PEFT's."""

    @property
    def layer4bit(self) -> Embedding4bit:
        layer = self.get_base_layer()
        assert isinstance(layer, Embedding4bit)
        return layer

    def decoded(self) -> Tensor:
        return self.layer4bit.dequantize(torch.float32)

    def to_dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return self.layer4bit.to_embedding(weight=weight)
