"""``GGUFSource``: tells the quantizer of transformers which weights of a GGUF file stay as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..form import Form
from ..integrations.transformers import Conv1D4bit, QLoRAConfig
from ..integrations.transformers.modules import dense_modules, empty_layer
from ..integrations.transformers.source import Source
from ..nn import is_dense, paths_to, tied_heads
from . import blocks


class StoredKind(Protocol):
    """``GGUFWeights.stored_kind``."""

    def __call__(self, name: str, shape: tuple[int, ...], transposed: bool) -> str | None: ...


class GGUFSource(Source):
    """The weights of a GGUF file, for a model that is loaded with ``config``.

    Args:
        stored_kind: the type in which the file stores a weight in 4 bits, if it does.

    Attributes:
        kept: after ``forms``, the names of the weights that stay 4-bit as they are stored.
    """

    name = "GGUF"

    def __init__(self, stored_kind: StoredKind, config: QLoRAConfig) -> None:
        self._stored_kind, self._config = stored_kind, config
        self.quantizes_rest = config.skip_modules is not None
        self.kept: set[str] = set()

    def __deepcopy__(self, memo: Any) -> GGUFSource:
        return self  # transformers copies configurations; the copy must have the same source

    def forms(self, model: nn.Module, files: Sequence[str] = ()) -> dict[str, Form]:
        found: dict[str, Form] = {}
        self.kept = set()
        for name, module in self._candidates(model):
            layer = empty_layer(module, torch.float32, Form())
            shapes = {f"{name}.{weight}": shape for weight, shape in layer.packed_shapes.items()}
            transposed = isinstance(layer, Conv1D4bit) or getattr(layer, "is_transposed", False)
            kinds = {self._stored_kind(weight, shape, transposed) for weight, shape in shapes.items()}
            kind = kinds.pop() if len(kinds) == 1 else None  # the weights of a module have one form
            if kind is not None:
                found |= dict.fromkeys(shapes, blocks.form_of(kind))
                self.kept |= {*shapes}
            elif isinstance(module, nn.Embedding):
                found |= dict.fromkeys(shapes, self._config.form)
        return found

    def _candidates(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules that may be 4-bit, by the configuration, and their names."""
        always = {*dense_modules(model).always}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        tables = tied_heads(model, tied, always) if self._config.embeddings else {}
        for name, module in model.named_modules():
            paths = paths_to(name)
            if not is_dense(module) or not always.isdisjoint(paths):
                continue
            if isinstance(module, nn.Embedding) and module not in tables:
                continue
            if all(should_convert_module(path, self._config.skip_modules) for path in paths):
                yield name, module
