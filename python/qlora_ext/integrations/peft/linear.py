"""PEFT's layers over a ``Linear4bit``, and its LoRA layer, which is one fused operator."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from torch import Tensor, nn

from ...merged import merged_weight
from ...nn import Linear4bit
from ...weight import NF4Weight
from .merge import Over4bit


def active_dropout(dropout: nn.Module) -> float:
    """The probability of dropping that a module of PEFT's ``lora_dropout`` has just now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def fold_scaling(b: Tensor, scaling: float | Tensor) -> tuple[Tensor, float]:
    """B and the scaling as the operators take it, a number.

    PEFT makes it a tensor (``prepare_model_for_compiled_hotswap``) for a compiled graph to serve adapters of every
    scaling. It is multiplied into B then.
    """
    return (b * scaling, 1.0) if isinstance(scaling, Tensor) else (b, scaling)


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
        self._decoded: list[nn.Parameter] = []

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        if not self._decoded:
            self._decoded.append(nn.Parameter(self._layer().dequantize(self._dtype), requires_grad=False))
        return self._decoded[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._layer()(x)
        return y


def decoded(layer: Linear4bit) -> nn.Linear:
    """The layer decoded to a float32 ``nn.Linear``: [N, K], also where the model's own kind is a Conv1D."""
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    # Not registered: PEFT's low_cpu_mem_usage has every parameter that is registered put on the meta device.
    dense._parameters["weight"] = nn.Parameter(layer.dequantize(torch.float32), requires_grad=False)
    if layer.bias is not None:
        dense._parameters["bias"] = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return dense.train(layer.training)


class OverLinear4bit(Over4bit):
    """Put before a PEFT layer class: the layer with a ``Linear4bit`` as its base.

    PEFT's code meets a decoded weight wherever it reads one. What it writes to the weight is quantized anew.
    """

    base_layer: nn.Module

    @property
    def layer4bit(self) -> Linear4bit:
        layer = self.base_layer
        assert isinstance(layer, Linear4bit)
        return layer

    @property
    def bias4bit(self) -> Tensor | None:
        return self.layer4bit.bias

    @contextlib.contextmanager
    def _base_as(self, stand_in: nn.Linear) -> Iterator[nn.Linear]:
        layer = self.base_layer
        self.base_layer = stand_in
        try:
            yield stand_in
        finally:
            self.base_layer = layer

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with self._base_as(decoded(self.layer4bit)) as dense:
            before = dense.weight.detach().clone()
            super().update_layer(*args, **kwargs)  # type: ignore[misc]
        if not torch.equal(dense.weight, before):  # PiSSA and its kin keep what they took out of the base
            self.requantize(dense.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:  # type: ignore[attr-defined]
            self.unmerge()
        # PEFT's code runs on a twin that shares all but the base: another thread may be in this very layer.
        twin = object.__new__(type(self))
        modules = {**self._modules, "base_layer": _Decoding(self.layer4bit, x.dtype)}  # type: ignore[attr-defined]
        twin.__dict__.update(self.__dict__, _modules=modules)
        y: Tensor = super(OverLinear4bit, twin).forward(x, *args, **kwargs)  # type: ignore[misc]
        return y

    def decoded(self) -> Tensor:
        return self.layer4bit.dequantize(torch.float32)

    def _merge_weights(self, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor | None]:
        with self._base_as(decoded(self.layer4bit)) as dense:
            # PEFT's own merge, which stands behind Over4bit's.
            super(Over4bit, self).merge(safe_merge=safe_merge, adapter_names=names)  # type: ignore[misc]
        return dense.weight, dense.bias

    def to_dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        merged = self.layer4bit.to_linear(weight=weight)
        if bias is not None:
            merged.bias = nn.Parameter(bias.detach().to(self.layer4bit.weight_dtype), requires_grad=False)
        self.base_layer = merged  # PEFT gives the module that it puts in our place the parameters found here
        return merged

    def __repr__(self) -> str:
        return f"{super().__repr__()}".removeprefix("lora.")


class LoraLinear4bit(OverLinear4bit, DenseLoraLinear):
    """PEFT's LoRA layer over a ``Linear4bit``.

    One plain active adapter runs as the one operator y = x · Wᵀ + scaling · dropout(x) · Aᵀ · Bᵀ + bias. Whatever else
    PEFT can do (several active adapters, adapters by sample, DoRA and its kin, biases on B) runs by PEFT's own code.
    """

    # Adapters that run, and are trained, as they will be once merged; ``set_merge_aware`` says which.
    merge_aware: frozenset[str] = frozenset()
    # In inference: the merged weight, and of what it was made.
    _kept: tuple[tuple[Any, ...], NF4Weight] | None = None

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

    def cast_fused(self) -> None:
        """Casts the adapter that the one operator runs with to the layer's compute dtype, as each call does."""
        adapter = self._fused_adapter({})
        if adapter is not None and not self.merge_aware:
            self.lora_A[adapter].to(self.layer4bit.compute_dtype)
            self.lora_B[adapter].to(self.layer4bit.compute_dtype)

    @property
    def trained_as_merged(self) -> bool:
        return bool(self.merged_adapters) and self.merge_aware.issuperset(self.merged_adapters)

    def _merged_weight(self, adapter: str) -> NF4Weight:
        layer, a, b = self.layer4bit, self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling = self.scaling[adapter]
        may_change = self.training or torch.is_grad_enabled() or isinstance(scaling, Tensor)
        if may_change or torch.compiler.is_compiling():
            self._kept = None
            return merged_weight(layer.weight4bit, a, *fold_scaling(b, scaling))
        made_of = scaling, *((id(t), t.data_ptr(), t.dtype, t._version) for t in (layer.weight, a, b))
        if self._kept is None or self._kept[0] != made_of:
            self._kept = made_of, merged_weight(layer.weight4bit, a, b, scaling)
        return self._kept[1]

    def _as_merged(self, x: Tensor, adapter: str) -> Tensor:
        dropout_p = active_dropout(self.lora_dropout[adapter])
        if dropout_p > 0.0:
            raise ValueError(f"lora_dropout: expected 0, for a merged adapter has none, got {dropout_p}")
        b, scaling = fold_scaling(self.lora_B[adapter].weight, self.scaling[adapter])
        return self.layer4bit.merged_forward(x, self._merged_weight(adapter), self.lora_A[adapter].weight, b, scaling)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._fused_adapter(kwargs)
        if adapter is not None and adapter in self.merge_aware:
            return self._as_merged(x, adapter)
        if adapter is not None:
            b, scaling = fold_scaling(self.lora_B[adapter].weight, self.scaling[adapter])
            dropout_p = active_dropout(self.lora_dropout[adapter])
            return self.layer4bit.fused_forward(x, self.lora_A[adapter].weight, b, scaling, dropout_p)
        if not self.disable_adapters and not self.merged and self.merge_aware.intersection(self.active_adapters):
            raise ValueError(
                f"adapters: expected a plain LoRA alone where one runs as merged, got {', '.join(self.active_adapters)}"
            )
        if self.lora_variant and not self.disable_adapters and not self.merged:
            return super().forward(x, *args, **kwargs)
        y: Tensor = DenseLoraLinear.forward(self, x, *args, **kwargs)
        return y


def cast_fused(model: nn.Module) -> None:
    """Casts the fused adapters of ``model`` to the dtype in which each call would cast them; for inference alone."""
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            module.cast_fused()
