"""Stacks of a layer's adapters for mixed batches. A layer retains one for as long as its adapters do not change."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters import StackedAdapters, stack_adapters
from ...merging.merge_aware import fold_scaling


class Adapter(NamedTuple):
    """A plain LoRA adapter of a layer: A [R, K], B [N, R], and the probability of dropout in this call.

    Of experts, A is [E, R, K] and B is [E, N, R].
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float | Tensor
    dropout_p: float


def _stack(adapters: Sequence[Adapter], dtype: torch.dtype) -> StackedAdapters:
    """Stacks ``adapters`` in a dtype that holds all of their values, and then rounds the two stacks to ``dtype``."""
    a = [adapter.a for adapter in adapters]
    b, scaling = zip(*(fold_scaling(adapter.b, adapter.scaling) for adapter in adapters), strict=True)
    stored = functools.reduce(torch.promote_types, (t.dtype for t in (*a, *b)))
    stack = stack_adapters([t.to(stored) for t in a], [t.to(stored) for t in b], scaling)
    return stack._replace(lora_a=stack.lora_a.to(dtype), lora_b=stack.lora_b.to(dtype))


_COMPARED = 64  # values of a parameter that is not trained
_state = operator.attrgetter("_version", "requires_grad", "dtype", "device")


class _RetainedStack:
    """A stack of a layer's adapters, and what tells that they have not changed since.

    Torch's version counters count most writes to a tensor, but not those through ``parameter.data``, nor those of fused
    optimizers. Parameters that require gradients are therefore compared with a copy. For the others, a few values are
    enough to notice that a program has written a whole parameter through ``data``.
    """

    def __init__(self, layer: Any, adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
        self.names, self._dtype = tuple(adapter.name for adapter in adapters), dtype
        self._parameters, self._scalings = _sources(layer, self.names)
        self._states = [*map(_state, self._parameters)]
        # Usable in calls with gradients too, even if the first call runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            # Aliases of the parameters' memory, which no other tensor can take while they exist.
            self._aliases = [p.detach() for p in self._parameters]
            flat = [alias.view(-1) for alias in self._aliases]
            trained = [p.requires_grad for p in self._parameters]
            self._compared = [t if all_of_it else t[:_COMPARED] for t, all_of_it in zip(flat, trained, strict=True)]
            self._contents = torch.cat(self._compared)
            self.stack = _stack(adapters, dtype)

    def serves(self, layer: Any, names: Sequence[str], dtype: torch.dtype) -> bool:
        """Whether the stack has the adapters ``names`` of the layer as they are now, in ``dtype``."""
        if dtype != self._dtype or not set(names).issubset(self.names):
            return False
        parameters, scalings = _sources(layer, self.names)
        return (
            all(map(operator.is_, parameters, self._parameters))
            and all(map(operator.is_, scalings, self._scalings))
            and [*map(_state, parameters)] == self._states
            and all(map(Tensor.is_set_to, parameters, self._aliases))
            and torch.equal(torch.cat(self._compared), self._contents)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies of the layer make their own


def _sources(layer: Any, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """The parameters and scalings of the adapters ``names``; None for those that the layer does not have."""
    modules = [layer.lora_A._modules, layer.lora_B._modules]
    parameters = [m[name]._parameters.get("weight") if name in m else None for name in names for m in modules]
    return parameters, [layer.scaling.get(name) for name in names]


def _can_retain(parameter: Any) -> bool:
    """Whether the changes of a parameter are noticed, without waiting for a device."""
    return (
        type(parameter) is nn.Parameter
        and parameter.device.type == "cpu"
        and not parameter.is_inference()  # it would have no version counter
        and parameter.is_contiguous()
    )


class StacksAdapters:
    """A mixin, placed before a PEFT layer class, for layers whose samples may have different adapters.

    On the CPU, a layer retains one stack, of the last call that stacked adapters. Training frees it, and so does
    deleting an adapter. Calls with one adapter do not, because a server may alternate between both.
    """

    _retained: _RetainedStack | None = None

    def forget_stack(self) -> None:
        if self._retained is not None:
            self._retained = None

    def stack(self, adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[tuple[str, ...], StackedAdapters]:
        """A stack that has ``adapters`` in ``dtype``, and the names of all of its adapters.

        It is differentiable if one of the adapters needs a gradient.
        """
        names = tuple(adapter.name for adapter in adapters)
        parameters, scalings = _sources(self, names)
        trains = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
        if trains:
            self.forget_stack()
        traced = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
        if trains or traced or torch.compiler.is_compiling():
            return names, _stack(adapters, dtype)
        retained = self._retained  # read once, because another thread may replace it
        if retained is None or not retained.serves(self, names, dtype):
            self.forget_stack()
            if not all(map(_can_retain, parameters)) or any(isinstance(scaling, Tensor) for scaling in scalings):
                return names, _stack(adapters, dtype)
            retained = self._retained = _RetainedStack(self, adapters, dtype)
        return retained.names, retained.stack

    def delete_adapter(self, adapter_name: str) -> None:
        self.forget_stack()
        super().delete_adapter(adapter_name)  # type: ignore[misc]
