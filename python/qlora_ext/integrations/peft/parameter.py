"""PEFT's LoRA on a dense parameter (``target_parameters``) of a model that is 4-bit elsewhere: a router's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn


def _with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A module that shares all with ``module`` but some parameters."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters})
    return twin


class LoraParameter(ParamWrapper):
    """PEFT's layer, but that its base is not changed while it runs.

    PEFT exchanges the parameter for the time of the call. Another thread would see that, and torch.compile cannot trace
    it. Here a twin of the base runs with the sum of the parameter and its adapters.
    """

    def forward(self, x: Tensor, *args: Any, parameters: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if "forward" in vars(base):  # accelerate's and others' hooks, which would run the base itself
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


LoraParameter.__name__ = "ParamWrapper"  # by which PEFT finds the wrapper that a second adapter belongs to
