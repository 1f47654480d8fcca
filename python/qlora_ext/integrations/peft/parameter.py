"""PEFT's LoRA on a dense parameter (``target_parameters``) of a model that is 4-bit elsewhere: a router's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn


def _with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy of ``module`` in which some parameters are replaced."""
    copied: nn.Module = object.__new__(type(module))
    copied.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters})
    return copied


class LoraParameter(ParamWrapper):
    """PEFT's layer, without changing its base during the call.

    PEFT replaces the parameter during the call, which other threads would see, and which torch.compile cannot trace.
    Here, a shallow copy of the base runs with the sum of the parameter and its adapters.
    """

    def forward(self, x: Tensor, *args: Any, parameters: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if "forward" in vars(base):  # hooks such as accelerate's call the original base
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        parameters = dict(parameters or {})
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        deltas = [self.get_delta_weight(name) for name in names if name in self.lora_A]
        if deltas:
            parameters[self.parameter_name] = sum(deltas, start=self.get_param())
        if isinstance(self.base_layer, LoraParameter):
            return self.base_layer(x, *args, parameters=parameters, **kwargs)
        return _with_parameters(base, parameters)(x, *args, **kwargs)


LoraParameter.__name__ = "ParamWrapper"  # PEFT finds the wrapper for a second adapter by this name
