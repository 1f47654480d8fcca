"""What transformers' registry of quantizers does not serve: other configurations, dtypes, and files that are written.

This module is imported automatically with ``transformers.modeling_utils``. ``_patches`` lists what it changes there.
"""

from __future__ import annotations

import copy
import importlib
import os
import pathlib
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from ...nn import Packed4bit
from ...nn.dense_16bit import Dense16bit
from .._patches import extend
from .checkpoint.checkpoint_source import CheckpointSource
from .config import METHOD, QLoRAConfig
from .deferred import has_deferred, write_file
from .model_card import OursMetadata, write_card
from .stored_config import check_index, find_config


@extend("transformers.modeling_utils:get_hf_quantizer")
def get_hf_quantizer(original: Any, config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(quantization_config, QLoRAConfig):
        return original(config, quantization_config, *args, **kwargs)
    if kwargs.pop("gguf_file", None) is not None:  # the original accepts only its own quantizer for a GGUF file
        quantization_config = copy.copy(quantization_config)
        gguf = importlib.import_module("qlora_ext.gguf.weights")  # it imports this package
        quantization_config._source = gguf.source_of(quantization_config)
        return original(config, quantization_config, *args, **kwargs)
    check_index(config)
    saved = find_config(config)
    if saved is None:
        return original(config, quantization_config, *args, **kwargs)
    config.quantization_config = _merged(saved, quantization_config)
    return original(config, None, *args, **kwargs)


def _merged(saved: Any, given: QLoRAConfig) -> QLoRAConfig:
    """The configuration that loads a checkpoint whose own is ``saved``, with the loading options of ``given``.

    transformers' merge requires a configuration of the checkpoint's class; ours also reads checkpoints of other
    formats.
    """
    fields: dict[str, Any] = saved if isinstance(saved, dict) else saved.to_dict()
    method = fields.get("quant_method", "bitsandbytes")
    config: QLoRAConfig
    if method == "bitsandbytes":
        config = QLoRAConfig.from_bitsandbytes(fields, stored=True)
        config.compute_dtype = given.compute_dtype
    elif method == METHOD:
        config = AutoHfQuantizer.merge_quantization_configs(saved, given)
    else:
        config = copy.copy(given)
        config._source = CheckpointSource(fields, given)
        if config.embeddings:
            raise ValueError(
                f"embeddings: expected False for a {config._source.name} checkpoint, whose dense weights stay dense"
            )
        return config
    config.take_options(given)
    return config


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


@extend("transformers.modeling_utils:safe_save_file")
def save_file(original: Any, tensors: Any, filename: Any, metadata: Any = None) -> Any:
    path = pathlib.Path(os.fspath(filename))
    if isinstance(metadata, OursMetadata):
        write_card(path.parent, metadata.activations)
    if has_deferred(tensors):
        return write_file(tensors, path, metadata)
    return original(tensors, filename, metadata=metadata)
