"""PEFT's layers over a ``Linear4bit``: LoRA as one fused operator, and every other method by PEFT's own code."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import Linear4bit
from ..weight import NF4Weight, quantize_nf4

try:
    from peft.utils.quantization_utils import QuantizationBackend
except ImportError:  # PEFT 0.19
    QuantizationBackend = object


class _Decoding(nn.Linear):
    """Stands for a 4-bit layer where code also reads its weight, which is decoded at the first look and not before.

    Its products are the 4-bit layer's, its parameters are none: it lives for one call.
    """

    def __init__(self, layer: Linear4bit, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.training = layer.training
        self.__dict__["bias"] = layer.bias
        self._layer: Callable[[], Linear4bit] = lambda: layer  # a submodule it is not
        self._dtype = dtype

    @functools.cached_property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return nn.Parameter(self._layer().dequantize(self._dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._layer()(x)
        return y


def _decoded(layer: Linear4bit) -> nn.Linear:
    """The layer decoded to a float32 ``nn.Linear``: [N, K], also where the model's own kind is a Conv1D."""
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    # Not registered: PEFT's low_cpu_mem_usage has every parameter that is registered put on the meta device.
    dense._parameters["weight"] = nn.Parameter(layer.dequantize(torch.float32), requires_grad=False)
    if layer.bias is not None:
        dense._parameters["bias"] = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return dense.train(layer.training)


class Over4bit:
    """Put before a PEFT layer class: the layer with a ``Linear4bit`` as its base.

    PEFT's code meets a decoded weight wherever it reads one. What it writes to the weight is quantized anew.
    """

    base_layer: nn.Module
    merged_adapters: list[str]
    # What merge found: the packed weight and the bias.
    _unmerged: tuple[NF4Weight, Tensor | None] | None = None

    @property
    def layer4bit(self) -> Linear4bit:
        layer = self.base_layer
        assert isinstance(layer, Linear4bit)
        return layer

    @contextlib.contextmanager
    def _base_as(self, stand_in: nn.Linear) -> Iterator[nn.Linear]:
        layer = self.base_layer
        self.base_layer = stand_in
        try:
            yield stand_in
        finally:
            self.base_layer = layer

    def requantize(self, weight: Tensor) -> None:
        """Makes ``weight`` [N, K] the 4-bit weight, in the form that it has."""
        layer = self.layer4bit
        w4 = quantize_nf4(weight, layer.block_size, layer.double_quant, layer.nested_block_size)
        layer.set_weight(dataclasses.replace(w4, dtype=layer.weight_dtype))

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with self._base_as(_decoded(self.layer4bit)) as dense:
            before = dense.weight.detach().clone()
            super().update_layer(*args, **kwargs)  # type: ignore[misc]
        if not torch.equal(dense.weight, before):  # PiSSA and its kin keep what they took out of the base
            self.requantize(dense.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._base_as(_Decoding(self.layer4bit, x.dtype)):
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit weight, which is quantized anew; ``unmerge`` gives back the old bits."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        names = [*self.merged_adapters, *names]
        if self.merged_adapters:
            self.unmerge()
        layer = self.layer4bit
        kept = layer.weight4bit, None if layer.bias is None else layer.bias.detach().clone()
        dense = self.merge_dense(names, safe_merge)
        self._unmerged = kept
        self.set_merged(dense)

    def set_merged(self, dense: nn.Linear) -> None:
        """Quantizes what ``merge_dense`` gave, in the place of the weight that there is."""
        self.requantize(dense.weight)
        bias = self.layer4bit.bias
        if bias is not None:
            bias.data = dense.bias.detach().to(bias.dtype)

    def merge_dense(self, names: list[str], safe_merge: bool = False) -> nn.Linear:
        """The decoded layer in float32 with the named adapters merged into it by PEFT."""
        if self.layer4bit.is_sharded:
            raise ValueError(
                "merge: expected a layer that is whole, got one that FSDP2 has sharded; save the adapters, and merge "
                "them in one process"
            )
        with self._base_as(_decoded(self.layer4bit)) as dense:
            super().merge(safe_merge=safe_merge, adapter_names=names)  # type: ignore[misc]
        return dense

    def unmerge(self) -> None:
        if not self.merged_adapters or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.layer4bit
        w4, bias = self._unmerged
        layer.set_weight(w4.to(layer.weight.device))
        if bias is not None:
            layer.bias.data = bias.to(layer.bias)
        self._unmerged = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The layer without its adapters: 4-bit as it was or, merged, dense in the dtype of the quantized weight."""
        layer = self.layer4bit
        if not merge:
            return layer
        names = list(self.merged_adapters)
        if self.merged_adapters:
            self.unmerge()
        names += [name for name in check_adapters_to_merge(self, adapter_names) if name not in names]
        if not names:
            return layer
        dense = self.merge_dense(names, safe_merge)
        merged = layer.to_linear(weight=dense.weight)
        if dense.bias is not None:
            merged.bias = nn.Parameter(dense.bias.detach().to(layer.weight_dtype), requires_grad=False)
        self.base_layer = merged  # PEFT gives the module that it puts in our place the parameters found here
        return merged

    def __repr__(self) -> str:
        return f"{super().__repr__()}".removeprefix("lora.")


class LoraLinear4bit(Over4bit, DenseLoraLinear):
    """PEFT's LoRA layer over a ``Linear4bit``.

    One plain active adapter runs as the one operator y = x · Wᵀ + scaling · dropout(x) · Aᵀ · Bᵀ + bias. Whatever else
    PEFT can do (several active adapters, adapters by sample, DoRA and its kin, biases on B) runs by PEFT's own code.
    """

    def __init__(self, base_layer: Linear4bit, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if config.fan_in_fan_out:  # GPT-2's Conv1D is an ordinary [N, K] once it is 4-bit
            config = copy.copy(config)
            config.fan_in_fan_out = False
        DenseLoraLinear.__init__(self, base_layer, adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        init = config.init_lora_weights
        if init == "loftq":
            raise ValueError(
                "init_lora_weights: LoftQ needs the weights that were quantized, and this base holds none; make the "
                "adapter with init_lora_weights=True and call peft.replace_lora_weights_loftq(model, model_path)"
            )
        reads_weight = (isinstance(init, str) and init != "gaussian") or self.resolve_lora_variant(config=config)
        update = super().update_layer if reads_weight else functools.partial(DenseLoraLinear.update_layer, self)
        update(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _fused_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The adapter that the one operator can run, or None."""
        if self.disable_adapters or self.merged or any(value is not None for value in kwargs.values()):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or hasattr(self.base_layer, "_hf_hook"):
            return None
        plain = type(self.lora_A[active[0]]) is nn.Linear and type(self.lora_B[active[0]]) is nn.Linear
        return active[0] if plain and self.lora_B[active[0]].bias is None else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._fused_adapter(kwargs)
        if adapter is not None:
            dropout = self.lora_dropout[adapter]
            p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            return self.layer4bit.fused_forward(x, a, b, self.scaling[adapter], p)
        if self.lora_variant and not self.disable_adapters and not self.merged:
            return super().forward(x, *args, **kwargs)
        y: Tensor = DenseLoraLinear.forward(self, x, *args, **kwargs)
        return y


class _Backend(QuantizationBackend):
    """By what PEFT (>= 0.20) tells that a layer is quantized, where its methods know of such things."""

    supports_merge = True
    backend_name = "qlora_ext NF4"
    layer_type = "linear"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        weight: Tensor = base_layer.dequantize() if isinstance(base_layer, Linear4bit) else base_layer.weight.data
        return weight

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        base_layer = peft_layer.get_base_layer()
        if isinstance(base_layer, Linear4bit):
            peft_layer.requantize(weight_data)
        else:
            base_layer.weight.data = weight_data


@functools.cache
def _over_4bit(cls: Any) -> Any:
    return type(f"{cls.__name__}4bit", (Over4bit, cls), {"quantization_backend": _Backend()})


def create_over_4bit(original: Any, self: Any, config: Any, name: str, target: Any, *args: Any, **kwargs: Any) -> None:
    """Around the ``_create_and_replace`` of a PEFT method: a 4-bit target is built over as its decoded twin.

    Raises:
        TypeError: the method keeps no base layer to put the 4-bit one back into.
    """
    if not isinstance(target, Linear4bit):
        original(self, config, name, target, *args, **kwargs)
        return
    target_name, parent = args[0], args[1]
    dense = _decoded(target)
    before = dense.weight.detach().clone()
    original(self, config, name, dense, *args, **kwargs)
    layer = getattr(parent, target_name)
    if not isinstance(layer, BaseTunerLayer) or getattr(layer, "base_layer", None) is not dense:
        setattr(parent, target_name, target)
        raise TypeError(f"target_modules: {type(self).__name__} cannot train over 4-bit layers ({target_name})")
    layer.base_layer = target
    kind: Any = type(layer)
    layer.__class__ = _over_4bit(kind)
    if not torch.equal(dense.weight, before):
        layer.requantize(dense.weight)
