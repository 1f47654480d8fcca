"""Makes ``from_pretrained(..., gguf_file=..., quantization_config=QLoRAConfig())`` keep the 4-bit weights of a file."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..integrations.transformers import QLoRAConfig
from .source import GGUFSource
from .weights import GGUFWeights


def _open(files: Sequence[str], model: nn.Module) -> GGUFWeights:
    weights = GGUFWeights(files[0], model)
    weights.check_complete()
    return weights


def source_of(config: QLoRAConfig) -> GGUFSource:
    """The source of the file that transformers opens for a model with ``config``."""
    return GGUFSource(config, _open)
