"""PEFT's LoRA on a dense parameter (``target_parameters``) of a model that is 4-bit elsewhere: a router's weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from .call_cache import samples_of_call


def _with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy of ``module`` in which some parameters are replaced."""
    copied: nn.Module = object.__new__(type(module))
    copied.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters})
    return copied


def _select(outputs: Sequence[Any], chosen: Tensor) -> Any:
    """For each token, the rows of one of several outputs. ``chosen`` [samples, tokens] has their numbers."""
    first = outputs[0]
    if isinstance(first, tuple | list):
        return type(first)(_select(parts, chosen) for parts in zip(*outputs, strict=True))
    if not isinstance(first, Tensor):
        return first
    for shape in (chosen.shape, (chosen.numel(),)):
        if first.shape[: len(shape)] == shape:
            rows = torch.stack([*outputs]).flatten(1, len(shape))
            tokens = torch.arange(chosen.numel(), dtype=torch.int64, device=chosen.device)
            return rows[chosen.flatten(), tokens].unflatten(0, shape)
    raise ValueError(
        f"adapter_names: expected outputs with a row per token ({chosen.numel()}) of modules whose parameters have "
        f"adapters, got shape {list(first.shape)}; activate the adapter with set_adapter instead"
    )


class LoraParameter(ParamWrapper):
    """PEFT's layer, without changing its base during the call, and with adapters per sample (``adapter_names``).

    PEFT replaces the parameter during the call, which other threads would see, and which torch.compile cannot trace.
    Here, a shallow copy of the base runs with the sum of the parameter and its adapters. As in PEFT, layers wrap each
    other if several parameters of a module have adapters. With adapters per sample, the base runs once per adapter.
    """

    def _wrappers(self) -> Iterator[LoraParameter]:
        layer: Any = self
        while isinstance(layer, LoraParameter):
            yield layer
            layer = layer.base_layer

    def _parameters_with(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The base's parameters that adapters change, with the adapters ``names`` or the active ones."""
        parameters = {}
        for layer in self._wrappers():
            active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
            chosen = active if names is None else names
            deltas = [layer.get_delta_weight(name) for name in chosen if name in layer.lora_A]
            if deltas:
                parameters[layer.parameter_name] = sum(deltas, start=layer.get_param())
        return parameters

    def _by_sample(self, base: nn.Module, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        samples = samples_of_call(self, x)
        for layer in self._wrappers():
            LoraLayer._check_forward_args(layer, samples, adapter_names=names)
        distinct = [*dict.fromkeys(names)]
        outputs = [_with_parameters(base, self._parameters_with([name]))(x, *args, **kwargs) for name in distinct]
        if len(distinct) == 1:
            return outputs[0]
        chosen = torch.tensor([distinct.index(name) for name in names], dtype=torch.int64, device=x.device)
        return _select(outputs, chosen[:, None].expand(samples.shape[:2]))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if "forward" in vars(base):  # hooks such as accelerate's call the original base
            return super().forward(x, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        for layer in self._wrappers():
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        if names is not None and not self.disable_adapters:
            return self._by_sample(base, names, x, *args, **kwargs)
        return _with_parameters(base, self._parameters_with())(x, *args, **kwargs)


LoraParameter.__name__ = "ParamWrapper"  # PEFT finds the wrapper for a second adapter by this name
