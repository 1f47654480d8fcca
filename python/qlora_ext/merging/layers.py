"""What all of PEFT's layers over 4-bit modules share: their adapters are merged into the codes, and unmerged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..formats import FP4, NF4
from ..nn import Embedding4bit, Linear4bit, Packed4bit
from ..weight import Weight4bit
from .codes import RETAINED_BY_NEAREST, retained_update, seed_of, with_nearest_codes, with_update

try:
    from peft.utils.quantization_utils import QuantizationBackend
except ImportError:  # PEFT 0.19
    QuantizationBackend = object


class _Backend(QuantizationBackend):
    """PEFT's (>= 0.20) interface to quantized layers, which some of its methods use."""

    supports_merge = True
    backend_name = "qlora_ext 4bit"
    layer_type = "linear"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        is_4bit = isinstance(base_layer, Linear4bit | Embedding4bit)
        weight: Tensor = base_layer.dequantize() if is_4bit else base_layer.weight.data
        return weight

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        base_layer = peft_layer.get_base_layer()
        if isinstance(base_layer, Linear4bit | Embedding4bit):
            peft_layer.requantize(weight_data)
        else:
            base_layer.weight.data = weight_data


class Over4bit:
    """A mixin, placed before a PEFT layer class, for layers whose base is a 4-bit module.

    Merging rounds the sum of a weight and its adapters to 4 bits again. Unmerging restores the old bits.
    """

    quantization_backend = _Backend()
    merged_adapters: list[str]
    # Methods that subclasses define: the decoded weight in float32, in the dense weight's shape; and the dense module
    # with the results of ``merged_weights``, in the dtype of the weight. They are not abstract, because PEFT's layers
    # change their class at run time, which Python rejects where a base is abstract.
    decoded: Callable[[], Tensor]
    to_dense: Callable[[Tensor, Tensor | None], nn.Module]
    parameter_name = "weight"
    # The class of LoRA layers over a ``Linear4bit``, which the integration of PEFT sets.
    lora_linear: ClassVar[type[Over4bit]]
    # The seed for rounding merged weights, see ``set_name``.
    rounding_seed = 0
    # The state before the merge: the packed weight, the module's parameter for it, and the bias.
    _unmerged: tuple[Weight4bit, Tensor, Tensor | None] | None = None

    @property
    def layer4bit(self) -> Packed4bit:
        """The 4-bit module."""
        layer = self.get_base_layer()  # type: ignore[attr-defined]
        assert isinstance(layer, Packed4bit)
        return layer

    def set_name(self, name: str) -> None:
        """Sets the layer's name in the model, from which the rounding seed of its merged weight is derived."""
        self.rounding_seed = seed_of(f"{name}.{self.parameter_name}")

    def trained_weight(self, names: list[str]) -> Weight4bit | None:
        """The weight with the adapters ``names``, if it is the one that they were trained with; else None."""
        return None

    @property
    def bias4bit(self) -> Tensor | None:
        """The module's bias if adapters can change it, else None."""
        return None

    def move_adapter(self, name: str, device: torch.device) -> None:
        """Moves the modules of an adapter to ``device``, except those on the meta device."""
        for names in (self.adapter_layer_names, self.other_param_names):  # type: ignore[attr-defined]
            for container in (getattr(self, attribute, None) for attribute in names):
                if isinstance(container, nn.ModuleDict) and name in container:
                    module = container[name]
                    if not any(p.is_meta for p in module.parameters()):
                        module.to(device)

    def requantize(self, weight: Tensor) -> None:
        """Replaces the 4-bit weight by ``weight``, rounded to the nearest codes.

        bitsandbytes' formats get new scales. Those of other formats do not change, because other tensors of a
        checkpoint depend on them: the factor of a weight, or a group of blocks that shares a scale.
        """
        layer = self.layer4bit
        if layer.form.code in (NF4, FP4):
            w4 = layer.quantize(weight).replace(dtype=layer.weight_dtype)
        else:
            w4 = with_nearest_codes(layer.packed_weight(self.parameter_name), layer.as_quantized(weight))
        layer.set_packed(self.parameter_name, w4)

    def names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Those of the given adapters (None: the active ones) that this layer has and that are not merged yet."""
        here = self._get_available_adapters()  # type: ignore[attr-defined]
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in here]

    def before_and_after(self) -> tuple[Tensor, Tensor]:
        """The decoded weight, and its sum with the active adapters. The layer does not change."""
        if self.merged_adapters:
            self.unmerge()
        before, names = self.decoded(), self.names_to_merge(None)
        if not names:
            return before, before
        after, _ = self.merged_weights(names)
        self.merged_adapters.clear()
        return before, after

    def merged_weights(self, names: list[str], safe_merge: bool = False) -> tuple[Tensor, Tensor | None]:
        """The decoded weight and bias in float32 with the named adapters, which count as merged from now on."""
        if self.layer4bit.is_sharded:
            raise ValueError(
                "merge: expected an unsharded layer, got one that FSDP2 has sharded; save the adapters, and merge "
                "them in one process"
            )
        return self._merge_weights(names, safe_merge)

    def _merge_weights(self, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor | None]:
        weight = self.decoded()
        for name in names:
            weight += self.get_delta_weight(name).to(weight)  # type: ignore[attr-defined]
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.merged_adapters.extend(names)
        return weight, None

    def set_merged(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replaces the 4-bit weight by the results of ``merged_weights``.

        An adapter that was trained merge-aware gets the weight of its training. Others that move the weights far enough
        for the nearest codes to retain the update are rounded to those (``requantize``), and the rest is rounded
        stochastically under the old scales (``with_update``).
        """
        if self.bias4bit is not None and bias is not None:
            self.bias4bit.data = bias.detach().to(self.bias4bit.dtype)
        layer = self.layer4bit
        w4 = layer.packed_weight(self.parameter_name)
        layer.unshare(self.parameter_name)  # with PEFT's layer_replication, copies of a layer have separate adapters
        trained = self.trained_weight(self.merged_adapters)
        if trained is not None:
            layer.set_packed(self.parameter_name, trained)
            return
        before = self.decoded()
        self.requantize(weight)
        retained, total = retained_update(weight - before, before, self.decoded())
        if retained >= RETAINED_BY_NEAREST * total:
            return
        layer.set_packed(self.parameter_name, with_update(w4, layer.as_quantized(weight), self.rounding_seed))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit weight, see ``set_merged``. ``unmerge`` restores the old bits."""
        names = self.names_to_merge(adapter_names)
        if not names:
            return
        names = [*self.merged_adapters, *names]
        if self.merged_adapters:
            self.unmerge()
        bias = self.bias4bit
        layer = self.layer4bit
        w4 = layer.packed_weight(self.parameter_name)
        stored = layer._parameters[self.parameter_name]
        assert stored is not None
        before_merge = w4.to(stored.device), stored, None if bias is None else bias.detach().clone()
        merged = self.merged_weights(names, safe_merge)
        self._unmerged = before_merge
        self.set_merged(*merged)

    def unmerge(self) -> None:
        if not self.merged_adapters or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        w4, stored, bias = self._unmerged
        layer = self.layer4bit
        layer.put_back(self.parameter_name, w4.replace(dtype=layer.weight_dtype), stored)
        if self.bias4bit is not None and bias is not None:
            self.bias4bit.data = bias.to(self.bias4bit)
        self._unmerged = None
        self.merged_adapters.clear()

    def take_merged(self, safe_merge: bool, adapter_names: list[str] | None) -> tuple[Tensor, Tensor | None] | None:
        """Unmerges, and returns ``merged_weights`` of the merged adapters and those to merge; None if none."""
        names = list(self.merged_adapters)
        if self.merged_adapters:
            self.unmerge()
        names += [name for name in self.names_to_merge(adapter_names) if name not in names]
        return self.merged_weights(names, safe_merge) if names else None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The module without adapters: the 4-bit module, or if merged, dense in the dtype of the weight."""
        merged = self.take_merged(safe_merge, adapter_names) if merge else None
        return self.layer4bit if merged is None else self.to_dense(*merged)
