"""The weights of a loaded model with its adapters, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor

from qlora_ext.merging.layers import Over4bit
from qlora_ext.nn import Experts4bit, Packed4bit
from qlora_ext.weight import Weight4bit

# A weight without and with its adapters, float32, and its 4-bit weight, if it has one.
Read = tuple[Tensor, Tensor, Weight4bit | None]


class MergedWeights:
    """The weights of a model that may have adapters, by their names in the dense model without adapters.

    Adapters on dense layers are merged at once, those on 4-bit layers when their weight is read.

    Args:
        model: loaded.
        calibrated: the merged weights of linear layers that are 4-bit already, by the name of the layer.
        dense: reads a dense weight more precisely than the model has it. Adapters must then be plain LoRA.
    """

    def __init__(
        self, model: Any, calibrated: Mapping[str, Weight4bit], dense: Callable[[str], Tensor] | None = None
    ) -> None:
        self._calibrated = calibrated
        self._model = model.base_model.model if isinstance(model, PeftModel) else model
        self._dense = dense
        self._over: dict[str, Over4bit] = {}
        self._over_dense: dict[str, BaseTunerLayer] = {}
        for name, layer in self._model.named_modules():
            weight = f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            if isinstance(layer, Over4bit):
                self._over[weight] = layer
            elif isinstance(layer, BaseTunerLayer):
                self._over_dense[weight] = layer  # such as the output head
                if dense is None:
                    layer.merge()
        self._last: tuple[str, Read] | None = None

    def read(self, name: str) -> Read:
        """A weight, on the CPU. The last one is kept, because several tensors of a file may come from it."""
        if self._last is None or self._last[0] != name:
            self._last = None
            before, after, w4 = self._read(name)
            before, after = before.cpu(), before.cpu() if after is before else after.cpu()
            self._last = name, (before, after, None if w4 is None else w4.to("cpu"))
        return self._last[1]

    def _read(self, name: str) -> Read:
        path, _, parameter = name.rpartition(".")
        if parameter == "weight" and path in self._calibrated:
            w4 = self._calibrated[path]
            w = w4.dequantize(torch.float32)
            return w, w, w4
        if name in self._over:
            over = self._over[name]
            trained = over.trained_weight(over.names_to_merge(None))
            if trained is not None:  # merge-aware
                w = over.layer4bit.as_quantized(trained.dequantize(torch.float32))  # transposing twice changes nothing
                return w, w, trained
            return *over.before_and_after(), over.layer4bit.packed_weight(over.parameter_name)
        module = self._module(path)
        if isinstance(module, Packed4bit) and parameter in module.packed_shapes:
            dense: Any = module  # experts have several weights
            which = (parameter,) if isinstance(module, Experts4bit) else ()
            w = dense.dequantize(*which, torch.float32)
            return w, w, module.packed_weight(parameter)
        if self._dense is not None:
            before = after = self._dense(name)
            if name in self._over_dense:
                layer: Any = self._over_dense[name]
                updates = [layer.get_delta_weight(adapter).float().cpu() for adapter in layer.active_adapters]
                after = sum(updates, before)
            return before, after, None
        value = getattr(module, parameter).detach().float()
        if parameter == "bias" and f"{path}.weight" in self._over:
            value = self._bias(self._over[f"{path}.weight"], value)
        return value, value, None

    def _bias(self, over: Over4bit, bias: Tensor) -> Tensor:
        """The bias of a 4-bit layer with the adapters that change it."""
        names = over.names_to_merge(None) if over.bias4bit is not None else []
        if not names:
            return bias
        _, merged = over.merged_weights(names)
        over.merged_adapters.clear()
        return bias if merged is None else merged.detach().float()

    def _module(self, path: str) -> Any:
        """A module, without PEFT's layers around it."""
        module = self._model
        for part in path.split("."):
            module = getattr(module, part)
            while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                if isinstance(module, BaseTunerLayer):
                    module = module.get_base_layer()
                elif isinstance(module, ModulesToSaveWrapper):
                    module = module.modules_to_save[module.active_adapters[0]]
                else:
                    module = module.original_module
        return module
