"""GGUF files: reads and checks their header, and decodes their weights one at a time.

transformers decodes a whole GGUF file before it loads the model, and does not quantize it. ``GGUFWeights`` gives it one
weight at a time, so that a model is quantized to NF4 while it loads. It needs the package ``gguf``.

Example:
    >>> from qlora_ext.gguf import read_header
    >>> def sizes(path):
    ...     return {tensor.name: tensor.nbytes for tensor in read_header(path).tensors}
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal.hooks import after_import
from .._internal.lazy import lazily
from .file import Header, TensorInfo, read_header

if TYPE_CHECKING:
    from .weights import GGUFWeights

__all__ = ["GGUFWeights", "Header", "TensorInfo", "read_header"]

after_import("transformers.integrations.gguf.gguf_config_mapping", "qlora_ext.gguf.configs")

__getattr__, __dir__ = lazily(__name__, {"GGUFWeights": ".weights"}, __all__)  # it needs torch and numpy
