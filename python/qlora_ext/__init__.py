"""QLoRA for PyTorch: frozen 4-bit NormalFloat weights and LoRA adapters in one fused operator, on CPU and CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _hooks, autograd, nn
from ._library import build_info
from .autograd import linear_nf4
from .nn import quantize_model
from .weight import NF4Weight, dequantize_nf4, quantize_nf4

if TYPE_CHECKING:
    from .integrations.transformers import QLoRAConfig

__version__: str = build_info()["version"]
__all__ = [
    "NF4Weight",
    "QLoRAConfig",
    "autograd",
    "build_info",
    "dequantize_nf4",
    "linear_nf4",
    "nn",
    "quantize_model",
    "quantize_nf4",
]


# Saved 4-bit models, LoRA on 4-bit layers and FSDP2 are provided for without a further import.
_hooks.after_import("transformers.quantizers.auto", "qlora_ext.integrations.transformers")
_hooks.after_import("transformers.modeling_utils", "qlora_ext.integrations.transformers.counting")
_hooks.after_import("transformers.modeling_utils", "qlora_ext.integrations.transformers.model_card")
_hooks.after_import("peft.peft_model", "qlora_ext.integrations.peft")
_hooks.after_import("torch.distributed.fsdp._fully_shard._fsdp_param", "qlora_ext.integrations.fsdp")


def __getattr__(name: str) -> Any:
    if name == "QLoRAConfig":  # transformers is optional, and slow to import
        from .integrations.transformers import QLoRAConfig

        return QLoRAConfig
    raise AttributeError(f"module 'qlora_ext' has no attribute {name!r}")
