"""What transformers runs on the tensors of a 4-bit checkpoint: it collects them, fills modules, and restores names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import core_model_loading
from transformers.quantizers.quantizers_utils import get_module_from_name

from ....nn import Packed4bit, scale_names
from ....weight import Weight4bit
from ..weight_operations import UncastOperation, fill

# The name under which transformers collects the tensors of a weight.
PATTERN = "tensors of a 4-bit weight"


def module_of(name: str) -> str:
    """The name of the module that has the weight ``name``."""
    return name.rpartition(".")[0]


class Fill(UncastOperation):
    """Reads the tensors of a 4-bit weight into its module, by the source that takes the place of the quantizer."""

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        source, (module, name) = self.hf_quantizer, get_module_from_name(model, full_layer_name)
        tensors, missing = input_dict.pop(PATTERN), kwargs.get("missing_keys")
        try:
            if source.error is None:
                read = source.read(full_layer_name, tensors, module)
                if isinstance(read, Weight4bit):
                    return fill(module, full_layer_name, read, missing)
                return {full_layer_name: read}
        except ValueError as error:
            # transformers would hide the message, so the quantizer raises the error after all weights are read.
            source.error = error
        finally:
            source.release(*tensors)
        is_packed = isinstance(module, Packed4bit) and name in module.packed_shapes
        parts = (name, *scale_names(name).values()) if is_packed else (name,)
        if missing is not None:
            missing.difference_update(f"{module_of(full_layer_name)}.{part}" for part in parts)
        return {}


class PackedTensors(core_model_loading.WeightConverter):
    """Collects the tensors of each 4-bit weight, whatever their names.

    Args:
        targets: the names of the weights in the model, by the names of their tensors after transformers' renamings.
    """

    __slots__ = ("source", "targets")

    def __init__(self, source: Any, targets: Mapping[str, str]) -> None:
        super().__init__([PATTERN], [PATTERN], [Fill(source)])
        self.source, self.targets = source, targets

    def __deepcopy__(self, memo: Any) -> PackedTensors:
        return type(self)(self.source, self.targets)  # transformers makes a copy for each weight

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        target = self.targets.get(source_key)
        return (source_key, None) if target is None else (target, PATTERN)


class OriginalNames(core_model_loading.WeightRenaming):
    """Restores, when a model is saved, the names that tensors have in the checkpoint; it changes no name on loading.

    Args:
        names: the original names of tensors, by the names that transformers' own renamings give them on saving.
    """

    __slots__ = ("is_reversed", "names")

    def __init__(self, names: Mapping[str, str], is_reversed: bool = False) -> None:
        super().__init__([PATTERN], [PATTERN])
        self.names, self.is_reversed = names, is_reversed

    def __deepcopy__(self, memo: Any) -> OriginalNames:
        return type(self)(self.names, self.is_reversed)

    def reverse_transform(self) -> OriginalNames:
        return type(self)(self.names, not self.is_reversed)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed = self.names.get(source_key) if self.is_reversed else None
        return (source_key, None) if renamed is None else (renamed, source_key)
