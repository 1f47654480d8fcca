"""``integrate``: changes other libraries for 4-bit weights, when the first of them is made and not before."""

from __future__ import annotations

import torch

from .hooks import after_import, import_integration

# What needs no other library than torch, or waits for its own.
_AT_ONCE = (
    "qlora_ext.gguf",
    "qlora_ext.integrations.flops",
    "qlora_ext.integrations.torch_export",
    "qlora_ext.integrations.bitsandbytes.adoption",
)
# Modules of other libraries, and what integrates them once they are imported.
_AFTER_IMPORT = {
    "transformers.modeling_utils": "qlora_ext.integrations.transformers.patches",
    "diffusers.models.modeling_utils": "qlora_ext.integrations.diffusers.models",
    "peft.peft_model": "qlora_ext.integrations.peft",
    "accelerate.hooks": "qlora_ext.integrations.accelerate",
    "torch.distributed.fsdp": "qlora_ext.integrations.fsdp",
}
_done = False


def integrate() -> None:
    """Integrates other libraries, those that are imported later too. Later calls do nothing."""
    global _done
    if torch.compiler.is_dynamo_compiling() or _done:  # a traced graph must not depend on _done
        return
    _done = True
    for module in _AT_ONCE:
        import_integration("torch", module)
    for module, integration in _AFTER_IMPORT.items():
        after_import(module, integration)
