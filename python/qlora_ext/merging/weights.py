"""The weights of a loaded model, each without and with the model's adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..nn import Experts4bit, Packed4bit
from ..weight import Weight4bit
from .layers import Over4bit


@dataclasses.dataclass(frozen=True)
class ModelWeight:
    """A weight of a model that may have adapters.

    Attributes:
        owner: PEFT's layer that adapts it, or else the module that has it.
        parameter: its name in the module.
    """

    owner: Any
    parameter: str

    @property
    def module(self) -> Any:
        """The module that has it, 4-bit or dense."""
        if isinstance(self.owner, Over4bit):
            return self.owner.layer4bit
        return self.owner.get_base_layer() if isinstance(self.owner, BaseTunerLayer) else self.owner

    @property
    def over_dense(self) -> BaseTunerLayer | None:
        """PEFT's layer that adapts it, if it is dense."""
        return self.owner if isinstance(self.owner, BaseTunerLayer) and not isinstance(self.owner, Over4bit) else None

    @property
    def is_4bit(self) -> bool:
        return isinstance(self.module, Packed4bit) and self.parameter in self.module.packed_shapes

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns. Buffers do not count."""
        value = getattr(self.module, self.parameter)
        return isinstance(value, nn.Parameter) and value.ndim > 1

    @property
    def stored(self) -> Weight4bit | None:
        """The 4-bit weight without adapters."""
        w4: Weight4bit | None = self.module.packed_weight(self.parameter) if self.is_4bit else None
        return w4

    @property
    def trained(self) -> Weight4bit | None:
        """The 4-bit weight with the active adapters, if it needs no rounding: none is on it, or it is merge-aware."""
        if not self.is_4bit:
            return None
        names = self.owner.names_to_merge(None) if isinstance(self.owner, Over4bit) else []
        return self.owner.trained_weight(names) if names else self.stored

    def decoded(self, w4: Weight4bit) -> Tensor:
        """The values of ``w4``, in the form of this weight, float32 in the dense weight's shape."""
        values: Tensor = self.module.as_quantized(w4.dequantize(torch.float32))  # transposing twice changes nothing
        return values

    def before_and_after(self) -> tuple[Tensor, Tensor]:
        """The weight, and its sum with the active adapters, float32 in the dense weight's shape.

        Adapters on a dense layer are merged into it, those on a 4-bit layer are not.
        """
        if isinstance(self.owner, Over4bit):
            return self.owner.before_and_after() if self.is_4bit else self._bias()
        if self.is_4bit:
            which = (self.parameter,) if isinstance(self.module, Experts4bit) else ()
            value = self.module.dequantize(*which, torch.float32)
            return value, value
        before = after = self._dense()
        if self.over_dense is not None:
            before = before.clone()
            self.merge_into_dense()
            after = self._dense()
        return before, after

    def merge_into_dense(self) -> None:
        """Merges the adapters on a dense layer, if they are not yet."""
        if self.over_dense is not None and not self.over_dense.merged:
            self.over_dense.merge()

    def _dense(self) -> Tensor:
        value: Tensor = getattr(self.module, self.parameter).detach().float()
        return value

    def _bias(self) -> tuple[Tensor, Tensor]:
        bias, names = self.module.bias.detach().float(), self.owner.names_to_merge(None)
        if self.owner.bias4bit is None or not names:
            return bias, bias
        _, merged = self.owner.merged_weights(names)
        self.owner.merged_adapters.clear()
        return bias, bias if merged is None else merged.detach().float()


def weights_of(model: Any) -> dict[str, ModelWeight]:
    """The weights, biases and buffers of a model, by their names in the dense model without adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: ModelWeight(owner, parameter) for name, owner, parameter in _weights(base, "")}


def _weights(module: Any, path: str, adapted: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any, str]]:
    """The weights below a module: their names, owners and names in their modules.

    Args:
        adapted: PEFT's layers around the module, by the parameters that they are on.
    """
    adapted = adapted or {}
    if isinstance(module, BaseTunerLayer):
        parameters = [getattr(module, "parameter_name", "weight"), *(["bias"] if isinstance(module, Over4bit) else [])]
        yield from _weights(module.base_layer, path, {**dict.fromkeys(parameters, module), **adapted})
    elif isinstance(module, ModulesToSaveWrapper):
        yield from _weights(module.modules_to_save[module.active_adapters[0]], path)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _weights(module.token_adapter, path)
    else:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}{name}", adapted.get(name, module), name
        for name, child in module.named_children():
            yield from _weights(child, f"{path}{name}.")
