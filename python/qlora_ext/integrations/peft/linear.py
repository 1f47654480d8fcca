"""PEFT's layers over a ``Linear4bit``, and its LoRA layer, which runs as one fused operator."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hook

from ...merging.layers import Over4bit
from ...merging.merge_aware import MergeAware, fold_scaling
from ...nn import Linear4bit
from .call_cache import samples_of_call
from .operands import added, by_sample
from .stacks import ADAPTER_MODULES, Adapter, StacksAdapters


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
    """The dropout probability of a module in PEFT's ``lora_dropout``; 0 outside of training."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class _DenseProxy(nn.Linear):
    """A proxy of a 4-bit layer for one call of PEFT's code, which may read the weight.

    Its products are those of the 4-bit layer. The weight is decoded at the first access. It has no parameters.
    """

    def __init__(self, layer: Linear4bit, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.training = layer.training
        self.__dict__["bias"] = layer.bias
        self.of: Callable[[], Linear4bit] = lambda: layer  # a function, so that it is not a submodule
        self._dtype = dtype
        self._decoded: list[nn.Parameter] = []

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        if not self._decoded:
            self._decoded.append(nn.Parameter(self.of().dequantize(self._dtype), requires_grad=False))
        return self._decoded[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.of()(x)
        return y


def decoded(layer: Linear4bit, dtype: torch.dtype | None = None) -> nn.Linear:
    """The layer, decoded to an ``nn.Linear`` [N, K], even if the model's own class is Conv1D.

    Args:
        dtype: the default is that of the layer's weight.
    """
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    # Set without registration, because PEFT's low_cpu_mem_usage puts registered parameters on the meta device.
    dense._parameters["weight"] = weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        dense._parameters["bias"] = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    # Attributes that PEFT's preparations have set on the layer (CorDA's eigenvalues).
    dense.__dict__.update({key: value for key, value in vars(layer).items() if key not in vars(dense)})
    dense.compute_dtype = layer.compute_dtype  # type: ignore[assignment]  # that of PEFT's adapters on the layer
    return dense.train(layer.training)


Self = TypeVar("Self", bound="OverLinear4bit")

# Methods of PEFT's layers that read the base's weight and are not overridden here.
READERS = ("get_delta_weight", "get_delta_bias", "get_merged_weights", "update_scaling")


def reader(name: str) -> Callable[..., Any]:
    """A method that calls PEFT's method ``name`` with a proxy of the 4-bit layer as base, for ``OverLinear4bit``."""

    def method(self: OverLinear4bit, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer
        over = self._over(_DenseProxy(base, base.weight_dtype)) if isinstance(base, Linear4bit) else self
        return getattr(super(OverLinear4bit, over), name)(*args, **kwargs)

    method.__name__ = name
    return method


class OverLinear4bit(Over4bit):
    """A mixin, placed before a PEFT layer class, for layers whose base is a ``Linear4bit``.

    Where PEFT's code reads the base's weight, it gets the decoded weight. A weight that it writes is quantized again.
    """

    base_layer: nn.Module

    @property
    def layer4bit(self) -> Linear4bit:
        layer = self.base_layer
        if isinstance(layer, _DenseProxy):
            layer = layer.of()
        assert isinstance(layer, Linear4bit)
        return layer

    def _over(self: Self, base: nn.Module) -> Self:
        """A shallow copy of this layer over another base, because another thread may be using this layer."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, _modules={**self._modules, "base_layer": base})  # type: ignore[attr-defined]
        return copied

    @property
    def bias4bit(self) -> Tensor | None:
        return self.layer4bit.bias

    @contextlib.contextmanager
    def _base_as(self, dense: nn.Linear) -> Iterator[nn.Linear]:
        layer = self.base_layer
        self.base_layer = dense
        try:
            yield dense
        finally:
            self.base_layer = layer

    @contextlib.contextmanager
    def decoded_base(self) -> Iterator[None]:
        """Makes the decoded layer the base. A weight that PEFT's code has changed (PiSSA) is quantized again."""
        with self._base_as(decoded(self.layer4bit)) as dense:
            before = dense.weight.detach().clone()
            yield
        if not torch.equal(dense.weight, before):
            self.requantize(dense.weight)

    def _refuse_offloaded(self, x: Tensor) -> None:
        """Raises a ValueError if accelerate has offloaded the layer: its adapter would be on the meta device."""
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:  # type: ignore[attr-defined]
            self.unmerge()
        self._refuse_offloaded(x)
        copied = self._over(_DenseProxy(self.layer4bit, x.dtype))
        y: Tensor = super(OverLinear4bit, copied).forward(x, *args, **kwargs)  # type: ignore[misc]
        return y

    def decoded(self) -> Tensor:
        return self.layer4bit.dequantize(torch.float32)

    def _merge_weights(self, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor | None]:
        with self._base_as(decoded(self.layer4bit, torch.float32)) as dense:
            # PEFT's own merge, which Over4bit overrides.
            super(Over4bit, self).merge(safe_merge=safe_merge, adapter_names=names)  # type: ignore[misc]
        return dense.weight, dense.bias

    def to_dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        merged = self.layer4bit.to_linear(weight=weight)
        if bias is not None:
            merged.bias = nn.Parameter(bias.detach().to(self.layer4bit.weight_dtype), requires_grad=False)
        self.base_layer = merged  # PEFT takes the parameters of the replacement from here
        return merged

    def __repr__(self) -> str:
        return f"{super().__repr__()}".removeprefix("lora.")


_LINEAR, _DROPOUT = (nn.Linear,), (nn.Dropout, nn.Identity)


class LoraLinear4bit(StacksAdapters, MergeAware, OverLinear4bit, DenseLoraLinear):
    """PEFT's LoRA layer over a ``Linear4bit``.

    Plain adapters run in one operator, y = x · Wᵀ + scaling · dropout(x) · Aᵀ · Bᵀ + bias: a single one, several active
    ones without dropout, whose sum is one adapter, and one per sample (``adapter_names``). Everything else
    (several with dropout, DoRA and other variants, biases on B, hooks on the base or on the adapter's modules) runs
    PEFT's own code.
    """

    def __init__(self, base_layer: Linear4bit, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if config.fan_in_fan_out:  # in 4 bits, GPT-2's Conv1D is [N, K] like any linear layer
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
        with self.decoded_base() if reads_weight else contextlib.nullcontext():
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def runs_plain(self) -> bool:
        base: Any = self._modules["base_layer"]
        return not has_global_hook() and _is_plain(base, (type(base),))

    def plain_adapters(self, names: Iterable[str]) -> list[Adapter] | None:
        """Those of the adapters ``names`` that this layer has; None if PEFT's code must call a module and its hooks."""
        if not self.runs_plain():
            return None
        modules: Any = self._modules  # faster than nn.Module.__getattr__
        of_a, of_b, of_dropout = (modules[m]._modules for m in ADAPTER_MODULES)
        adapters = []
        for name in names:
            if name not in of_a:
                continue
            a, b, dropout = of_a[name], of_b[name], of_dropout[name]
            if name in self.lora_variant or b.bias is not None:
                return None
            if not (_is_plain(a, _LINEAR) and _is_plain(b, _LINEAR) and _is_plain(dropout, _DROPOUT)):
                return None
            adapters.append(Adapter(name, a.weight, b.weight, self.scaling[name], active_dropout(dropout)))
        return adapters

    def cast_fused(self) -> None:
        """Casts the adapters that run fused to the layer's compute dtype, as each call would."""
        for name in self.lora_A:
            if name not in self.merge_aware and self.plain_adapters([name]):
                self.lora_A[name].to(self.layer4bit.compute_dtype)
                self.lora_B[name].to(self.layer4bit.compute_dtype)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float | Tensor]:
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]

    def _as_merged(self, x: Tensor, adapters: list[Adapter] | None) -> Tensor:
        """The layer with the merged weight of the merge-aware adapter that is active."""
        if adapters is None or len(adapters) != 1:
            raise ValueError(
                "adapters: merge-aware LoRA runs as the only active adapter, without hooks on its modules, "
                f"got {', '.join(self.active_adapters)}"
            )
        (adapter,) = adapters
        if adapter.dropout_p > 0.0:
            raise ValueError(
                f"lora_dropout: expected 0, because a merged adapter has no dropout, got {adapter.dropout_p}"
            )
        b, scaling = fold_scaling(adapter.b, adapter.scaling)
        return self.layer4bit.merged_forward(x, self.merged_for(adapter.name), adapter.a, b, scaling)

    def _check_names(self, x: Tensor, names: Sequence[str]) -> None:
        self._check_forward_args(x, adapter_names=names)
        self.refuse_merge_aware(names)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.disable_adapters and not self.merged:
            lora: tuple[Any, ...] | None = None
            names = kwargs.get("adapter_names")
            may_fuse = all(value is None or key == "adapter_names" for key, value in kwargs.items())
            if names is not None:
                samples = samples_of_call(self, x)
                if samples is not x:
                    return self.forward(samples, *args, **kwargs).flatten(0, 1)
                self._check_names(x, names)
                lora = by_sample(self, x, names) if may_fuse else None
            else:
                adapters = self.plain_adapters(self.active_adapters) if may_fuse else None
                if self.merge_aware.intersection(self.active_adapters):
                    return self._as_merged(x, adapters)
                lora = None if adapters is None else added(self, x, adapters)
            if lora is not None:
                return self.layer4bit.fused_forward(x, *lora)
            if self.lora_variant:
                return super().forward(x, *args, **kwargs)
        self._refuse_offloaded(x)
        y: Tensor = DenseLoraLinear.forward(self, x, *args, **kwargs)
        return y


Over4bit.lora_linear = LoraLinear4bit


class LoraWeight4bit(LoraLinear4bit):
    """The layer for a ``Linear4bit`` whose weight is named in ``target_parameters``."""


LoraWeight4bit.__name__ = "ParamWrapper"  # PEFT finds the wrapper for a second adapter by this name


def cast_fused(model: nn.Module) -> None:
    """Casts the fused adapters of ``model`` to their layers' compute dtypes once, instead of at each call.

    For inference only, because training needs the adapters in their own dtype.

    Example:
        >>> from qlora_ext.integrations.peft import cast_fused
        >>> cast_fused(model.bfloat16().eval())
    """
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            module.cast_fused()
