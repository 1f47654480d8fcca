"""PEFT's layers over a ``Linear4bit``, and its LoRA layer, which is one fused operator."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hook

from ...merged import merged_weight
from ...nn import Linear4bit
from ...weight import Weight4bit
from .merge import Over4bit
from .reading import behind, stand_in


def _is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether calling ``module`` only runs the ``forward`` of its class, without hooks or a replaced ``forward``."""
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


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
    # What PEFT's preparations have left at the layer (CorDA's eigens).
    dense.__dict__.update({key: value for key, value in vars(layer).items() if key not in vars(dense)})
    return dense.train(layer.training)


Self = TypeVar("Self", bound="OverLinear4bit")

# Methods of PEFT's layers that read the base's weight, besides those that are overridden here.
READERS = ("get_delta_weight", "get_delta_bias", "get_base_weight", "get_merged_weights", "update_scaling")


def reader(name: str) -> Callable[..., Any]:
    """The method ``name`` of a PEFT layer, which reads the decoded weight if ``OverLinear4bit`` is the first base."""

    def method(self: OverLinear4bit, *args: Any, **kwargs: Any) -> Any:
        over = self._over(stand_in(self.base_layer)) if isinstance(self.base_layer, Linear4bit) else self
        return getattr(super(OverLinear4bit, over), name)(*args, **kwargs)

    method.__name__ = name
    return method


class OverLinear4bit(Over4bit):
    """Put before a PEFT layer class: the layer with a ``Linear4bit`` as its base.

    PEFT's code meets a decoded weight wherever it reads one. What it writes to the weight is quantized anew.
    """

    base_layer: nn.Module

    @property
    def layer4bit(self) -> Linear4bit:
        layer = behind(self.base_layer)
        assert isinstance(layer, Linear4bit)
        return layer

    def _over(self: Self, base: nn.Module) -> Self:
        """A copy of this layer over another base. A copy, because another thread may be using this layer."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _modules={**self._modules, "base_layer": base})  # type: ignore[attr-defined]
        return twin

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

    def _refuse_offloaded(self, x: Tensor) -> None:
        """Raises a ValueError if accelerate has offloaded the layer: its adapter would be trained on "meta"."""
        if not self.layer4bit.weight.is_meta or x.is_meta or not torch.is_grad_enabled():
            return
        named: Any = self.named_parameters()  # type: ignore[attr-defined]
        trained = [name for name, p in named if p.requires_grad and p.is_meta]
        if trained:
            raise ValueError(
                f"device_map: expected layers that are on a device, got an adapter ({trained[0]}) on a layer that is "
                'offloaded to the CPU or disk, which cannot be trained; load the model with QLoRAConfig(stream="disk") '
                'or QLoRAConfig(stream="ram") instead'
            )

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with self._base_as(decoded(self.layer4bit)) as dense:
            before = dense.weight.detach().clone()
            super().update_layer(*args, **kwargs)  # type: ignore[misc]
        if not torch.equal(dense.weight, before):  # PiSSA and its kin keep what they took out of the base
            self.requantize(dense.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:  # type: ignore[attr-defined]
            self.unmerge()
        self._refuse_offloaded(x)
        twin = self._over(_Decoding(self.layer4bit, x.dtype))
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


class _Adapter(NamedTuple):
    name: str
    a: Tensor
    b: Tensor
    dropout: nn.Module


_ADAPTER_MODULES = "lora_A", "lora_B", "lora_dropout"
_LINEAR, _DROPOUT = (nn.Linear,), (nn.Dropout, nn.Identity)


class LoraLinear4bit(OverLinear4bit, DenseLoraLinear):
    """PEFT's LoRA layer over a ``Linear4bit``.

    One plain active adapter runs as the one operator y = x · Wᵀ + scaling · dropout(x) · Aᵀ · Bᵀ + bias. Whatever else
    PEFT can do (several active adapters, adapters by sample, DoRA and its kin, biases on B, hooks on the base or on the
    adapter's modules) runs by PEFT's own code.
    """

    # Adapters that run, and are trained, as they will be once merged; ``set_merge_aware`` says which.
    merge_aware: frozenset[str] = frozenset()
    # In inference: the merged weight, and of what it was made.
    _kept: tuple[tuple[Any, ...], Weight4bit] | None = None

    def __init__(self, base_layer: Linear4bit, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if config.fan_in_fan_out:  # GPT-2's Conv1D is an ordinary [N, K] once it is 4-bit
            config = copy.copy(config)
            config.fan_in_fan_out = False
        DenseLoraLinear.__init__(self, base_layer, adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        init = config.init_lora_weights
        if init == "loftq":
            raise ValueError(
                "init_lora_weights: LoftQ needs the dense weights, which this base no longer has; make the "
                "adapter with init_lora_weights=True and call peft.replace_lora_weights_loftq(model, model_path)"
            )
        reads_weight = (isinstance(init, str) and init != "gaussian") or self.resolve_lora_variant(config=config)
        update = super().update_layer if reads_weight else functools.partial(DenseLoraLinear.update_layer, self)
        update(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _fused_adapter(self, kwargs: dict[str, Any]) -> _Adapter | None:
        """The adapter that the fused operator can run; if None, PEFT's code calls each module and its hooks."""
        if self.disable_adapters or self.merged or any(value is not None for value in kwargs.values()):
            return None
        modules = self._modules  # an attribute that is a module costs a search
        lora_a: Any = modules["lora_A"]
        active = [name for name in self.active_adapters if name in lora_a._modules]
        if len(active) != 1 or active[0] in self.lora_variant or has_global_hook():
            return None
        (name,) = active
        base, a, b, dropout = (modules["base_layer"], *(modules[m]._modules[name] for m in _ADAPTER_MODULES))
        if not (_is_plain(a, _LINEAR) and _is_plain(b, _LINEAR) and _is_plain(dropout, _DROPOUT)):
            return None
        if b.bias is not None or not _is_plain(base, (type(base),)):
            return None
        return _Adapter(name, a.weight, b.weight, dropout)

    def cast_fused(self) -> None:
        """Casts the adapter that the one operator runs with to the layer's compute dtype, as each call does."""
        adapter = self._fused_adapter({})
        if adapter is not None and not self.merge_aware:
            self.lora_A[adapter.name].to(self.layer4bit.compute_dtype)
            self.lora_B[adapter.name].to(self.layer4bit.compute_dtype)

    @property
    def trained_as_merged(self) -> bool:
        return bool(self.merged_adapters) and self.merge_aware.issuperset(self.merged_adapters)

    def _merged_weight(self, adapter: _Adapter) -> Weight4bit:
        layer, (name, a, b, _) = self.layer4bit, adapter
        scaling = self.scaling[name]
        may_change = self.training or torch.is_grad_enabled() or isinstance(scaling, Tensor)
        if may_change or torch.compiler.is_compiling():
            self._kept = None
            return merged_weight(layer.weight4bit, a, *fold_scaling(b, scaling), self.rounding_seed)
        made_of = (
            scaling,
            self.rounding_seed,
            *((id(t), t.data_ptr(), t.dtype, t._version) for t in (layer.weight, a, b)),
        )
        kept = self._kept  # read once: another thread may exchange it
        if kept is None or kept[0] != made_of:
            kept = self._kept = made_of, merged_weight(layer.weight4bit, a, b, scaling, self.rounding_seed)
        return kept[1]

    def _as_merged(self, x: Tensor, adapter: _Adapter) -> Tensor:
        dropout_p = active_dropout(adapter.dropout)
        if dropout_p > 0.0:
            raise ValueError(f"lora_dropout: expected 0, because a merged adapter has no dropout, got {dropout_p}")
        b, scaling = fold_scaling(adapter.b, self.scaling[adapter.name])
        return self.layer4bit.merged_forward(x, self._merged_weight(adapter), adapter.a, b, scaling)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._fused_adapter(kwargs)
        if adapter is not None and adapter.name in self.merge_aware:
            return self._as_merged(x, adapter)
        if adapter is not None:
            b, scaling = fold_scaling(adapter.b, self.scaling[adapter.name])
            return self.layer4bit.fused_forward(x, adapter.a, b, scaling, active_dropout(adapter.dropout))
        if not self.disable_adapters and not self.merged and self.merge_aware.intersection(self.active_adapters):
            raise ValueError(
                "adapters: merge-aware LoRA runs as the only active adapter, without hooks on its modules, "
                f"got {', '.join(self.active_adapters)}"
            )
        if self.lora_variant and not self.disable_adapters and not self.merged:
            return super().forward(x, *args, **kwargs)
        self._refuse_offloaded(x)
        y: Tensor = DenseLoraLinear.forward(self, x, *args, **kwargs)
        return y


def cast_fused(model: nn.Module) -> None:
    """Casts the fused adapters of ``model`` once to the dtype to which each call would cast them; for inference only.

    Example:
        >>> from qlora_ext.integrations.peft import cast_fused
        >>> cast_fused(model.bfloat16().eval())
    """
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            module.cast_fused()
