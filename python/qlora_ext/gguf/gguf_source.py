"""``GGUFSource``: tells the quantizer of transformers which weights of a GGUF file stay as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..form import Form
from ..integrations.transformers import Conv1D4bit, QLoRAConfig
from ..integrations.transformers.modules import dense_modules, empty_layer, tables_and_heads
from ..integrations.transformers.weight_source import Source
from ..nn import is_dense, paths_to, tied_heads
from . import blocks


class Weights(Protocol):
    """What a source needs of ``GGUFWeights``."""

    def stored_kind(self, name: str, shape: tuple[int, ...], transposed: bool) -> str | None: ...
    def check_requantized(self, names: Iterable[str]) -> None: ...
    def values(self, kept: set[str]) -> dict[str, Any]: ...
    def summarize(self, model: nn.Module, kept: set[str]) -> None: ...


class GGUFSource(Source):
    """The weights of a GGUF file, for a model that is loaded with ``config``.

    Args:
        open_file: returns the weights for a model. Its first argument has the path of the file that transformers opens.

    Attributes:
        kept: after ``forms``, the names of the weights that stay as they are stored.
        quantized: after ``forms``, the names of the layers' weights that are quantized.
    """

    name = "GGUF"

    def __init__(self, config: QLoRAConfig, open_file: Callable[[Sequence[str], nn.Module], Weights]) -> None:
        self._config, self._open_file = config, open_file
        self._weights: Weights | None = None
        self.kept: set[str] = set()
        self.quantized: list[str] = []

    def __deepcopy__(self, memo: Any) -> GGUFSource:
        return self  # transformers copies configurations; the copy must have the same source

    def forms(self, model: nn.Module, files: Sequence[str] = ()) -> dict[str, Form]:
        if self._weights is None:
            self._weights = self._open_file(files, model)
        found: dict[str, Form] = {}
        others: list[str] = []
        others_than_layers, has_layers = tables_and_heads(model), False
        self.kept.clear()
        for name, module in self._candidates(model):
            layer = empty_layer(module, torch.float32, Form())
            shapes = {f"{name}.{weight}": shape for weight, shape in layer.packed_shapes.items()}
            transposed = isinstance(layer, Conv1D4bit) or getattr(layer, "is_transposed", False)
            kinds = {weight: self._weights.stored_kind(weight, shape, transposed) for weight, shape in shapes.items()}
            stored = {weight: blocks.form_of(kind) for weight, kind in kinds.items() if kind is not None}
            is_layer = others_than_layers.isdisjoint(paths_to(name))
            if len(stored) == len(shapes) and not (is_layer and self._config.requantize):
                found |= stored
                self.kept |= {*shapes}
                has_layers |= is_layer
            elif is_layer:
                others += shapes
            elif isinstance(module, nn.Embedding) and self._config.embeddings:
                found |= dict.fromkeys(shapes, self._config.form)
        is_asked = self._config.requantize or self._config.skip_modules is not None
        self.quantizes_rest = is_asked or not has_layers
        self.quantized = others if self.quantizes_rest else []
        if not is_asked:
            self._weights.check_requantized(self.quantized)
        return found

    def values(self) -> dict[str, Any]:
        assert self._weights is not None
        return self._weights.values(self.kept)

    def loaded(self, model: nn.Module) -> None:
        assert self._weights is not None
        self._weights.summarize(model, self.kept)

    def _candidates(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules that may be packed, by the configuration, and their names."""
        always = {*dense_modules(model).always}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        tables = tied_heads(model, tied, always)
        for name, module in model.named_modules():
            paths = paths_to(name)
            if not is_dense(module) or not always.isdisjoint(paths):
                continue
            if isinstance(module, nn.Embedding) and module not in tables:
                continue
            if all(should_convert_module(path, self._config.skip_modules) for path in paths):
                yield name, module
