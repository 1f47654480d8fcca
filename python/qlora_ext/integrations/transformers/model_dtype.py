"""Makes ``PreTrainedModel.dtype`` the dtype in which a 4-bit model computes."""

from __future__ import annotations

from typing import Any

import torch

from ...nn import Packed4bit
from ...nn.dense_16bit import Dense16bit
from .._patches import extend


@extend("transformers.modeling_utils:PreTrainedModel.dtype")
def dtype(original: Any, self: Any) -> torch.dtype:
    for module in self.modules():
        # Frozen weights decode to, or are stored in, the checkpoint's dtype.
        frozen: dict[str, Any] = module.packed_state() if isinstance(module, Packed4bit) else {}
        frozen = {"weight": None} if isinstance(module, Dense16bit) else frozen
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point() and name not in frozen:
                found: torch.dtype = p.dtype
                return found
    fallback: torch.dtype = original(self)
    return fallback
