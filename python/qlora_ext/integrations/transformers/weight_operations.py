"""The operations that transformers runs on each weight of a checkpoint: quantize it, or read bitsandbytes' state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from ...nn import Linear4bit, Packed4bit, TiedLinear4bit, scale_names
from ...weight import Weight4bit
from .spill import Spill


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def fill(module: Packed4bit, name: str, w4: Weight4bit, missing: Any) -> dict[str, Tensor]:
    """Stores a weight in ``module``, and returns its tensors by the names under which transformers sets them again."""
    prefix, _, weight = name.rpartition(".")
    if isinstance(module, TiedLinear4bit):  # a copy of the table in the checkpoint; the scales are the table's
        return {name: nn.Parameter(w4.packed, requires_grad=False)}
    module.set_packed(weight, w4)
    scales = scale_names(weight).values()
    if missing is not None:  # the weight may have another scale form than the empty layer
        missing.difference_update(f"{prefix}.{scale}" for scale in scales)
    tensors = {f"{prefix}.{scale}": getattr(module, scale) for scale in scales}
    return {name: getattr(module, weight), **{key: t for key, t in tensors.items() if t is not None}}


class Quantize(ConversionOps):
    """Quantizes a dense weight that was just read, and frees it before the next one is read.

    A reader may pass a ``Weight4bit`` instead, which its layer takes as it is.

    Args:
        quantize: quantizes a dense weight of a checkpoint for a module.
        release: called with each dense weight after its last use.
        not_finite: receives the names of weights with NaN or infinity, and the index of the first such value.
        spill: stores the quantized weights, and may already have some.
    """

    def __init__(
        self,
        quantize: Callable[[Packed4bit, Tensor], Weight4bit],
        release: Callable[[Tensor], None],
        not_finite: dict[str, str],
        spill: Spill | None = None,
    ) -> None:
        self._quantize, self._release, self._not_finite, self._spill = quantize, release, not_finite, spill

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
        filled: dict[str, Tensor] = {}
        if self._spill is not None and self._spill.error is not None:
            raise self._spill.error  # writing has failed before
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            dense = _one(value)
            w4 = None if self._spill is None else self._spill.get(name)
            if w4 is None:
                w4 = dense if isinstance(dense, Weight4bit) else self._quantized(module, name, dense)
                if self._spill is not None and name not in self._not_finite:
                    w4 = self._spill.put(name, w4)
            filled |= fill(module, name, w4, kwargs.get("missing_keys"))
            if not isinstance(dense, Weight4bit):
                self._release(dense)
        return filled

    def _quantized(self, module: Packed4bit, name: str, dense: Tensor) -> Weight4bit:
        try:
            return self._quantize(module, dense)
        except ValueError as error:
            if dense.isfinite().all():
                raise
            # transformers would hide the message, so the error is raised after all weights are read.
            self._not_finite[name] = str(error)
            return self._quantize(module, torch.zeros_like(dense))


class UncastOperation(ConversionOps):
    """An operation that gets the file's tensors uncast: transformers looks for the attribute ``hf_quantizer``."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer


class LoadBitsandbytes(UncastOperation):
    """Reads the tensors that bitsandbytes saved for one weight into its layer, bit for bit."""

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        layer, name = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, Linear4bit):
            # Every weight of the checkpoint is passed, also those that are dense.
            dense: Tensor = _one(input_dict["weight"])
            return {full_layer_name: dense.to(getattr(layer, name).dtype)}
        w4 = Weight4bit.from_bitsandbytes({key: _one(value) for key, value in input_dict.items()}, "weight")
        return fill(layer, full_layer_name, w4, kwargs.get("missing_keys"))
