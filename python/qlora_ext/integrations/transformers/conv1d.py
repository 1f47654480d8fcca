"""Makes ``quantize_model`` replace GPT-2's ``Conv1D``, which is a linear layer with a transposed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...nn import CONVERSIONS, Linear4bit


class Conv1D4bit(Linear4bit):
    """A ``Linear4bit`` that replaces GPT-2's ``Conv1D``, whose weight is transposed: [K, N]."""

    @classmethod
    def from_linear(cls, linear: Any, *args: Any, **options: Any) -> Linear4bit:
        if not isinstance(linear, Conv1D):
            raise TypeError(f"linear: expected a transformers Conv1D, got {type(linear).__name__}")
        k, n = linear.weight.shape
        dense = nn.Linear(k, n, bias=False, device="meta")
        dense.weight = nn.Parameter(linear.weight.detach().T, requires_grad=False)
        dense.bias = linear.bias
        return super().from_linear(dense.train(linear.training), *args, **options)

    def matrices_of(self, dense: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: weight.T for name, weight in super().matrices_of(dense).items()}

    def to_linear(self, dtype: torch.dtype | None = None, weight: torch.Tensor | None = None) -> Any:
        dense = super().to_linear(dtype, weight)
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        conv.weight = nn.Parameter(dense.weight.detach().T.contiguous(), requires_grad=False)
        conv.bias = dense.bias
        return conv.train(self.training)


CONVERSIONS[Conv1D] = Conv1D4bit
