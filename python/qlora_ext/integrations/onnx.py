"""Makes ``torch.onnx.export`` reject models with 4-bit layers immediately, because ONNX has no operator for them.

This module is imported automatically with ``torch.onnx``. ``_patches`` lists what it changes in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn import Packed4bit
from ._patches import extend


def _is_packed(model: Any) -> bool:
    if isinstance(model, torch.export.ExportedProgram):
        return any(str(node.target).startswith("qlora.") for node in model.graph.nodes)
    return isinstance(model, nn.Module) and any(isinstance(m, Packed4bit) for m in model.modules())


@extend("torch.onnx:export")
def export(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_packed(model):
        raise ValueError(
            "model: ONNX export of 4-bit layers is not supported; export the dense model, which you get from "
            "merge_and_unload() of a PEFT model, or dequantize() of a transformers model"
        )
    return original(model, *args, **kwargs)
