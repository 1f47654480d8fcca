"""Layers of bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch


def bare(n: int = 96, k: int = 64, quant_type: str = "nf4", bias: bool = True, **options: Any) -> Any:
    """A quantized bitsandbytes layer."""
    torch.manual_seed(n + k)
    layer = bnb.nn.Linear4bit(k, n, bias=bias, quant_type=quant_type, **options)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(n, k, dtype=torch.bfloat16),
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=options.get("compress_statistics", True),
        quant_storage=options.get("quant_storage", torch.uint8),
        module=layer,
    )
    return layer.to("cpu")
