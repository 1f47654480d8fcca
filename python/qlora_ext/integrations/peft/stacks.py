"""Stacks of a layer's adapters for mixed batches. A layer retains one for as long as its adapters do not change."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
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


ADAPTER_MODULES = "lora_A", "lora_B", "lora_dropout"
_COMPARED = 64  # values of a parameter that does not require gradients
_EMPTY = "forward", "_forward_hooks", "_forward_pre_hooks"  # attributes of a module that PEFT's code need not call
_state = operator.attrgetter("_version", "requires_grad", "dtype", "is_cpu")
_training = operator.attrgetter("training")


class _RetainedStack:
    """A stack of a layer's adapters, and what tells that they have not changed since.

    Torch's version counters count most writes to a tensor, but not those through ``parameter.data``, nor those of fused
    optimizers. Parameters that require gradients are therefore compared with a copy. For the others, a few values are
    enough to notice that a program has written a whole parameter through ``data``.
    """

    def __init__(self, layer: Any, adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
        self.names, self._dtype, self._scaling = tuple(adapter.name for adapter in adapters), dtype, layer.scaling
        containers = [layer._modules[attribute]._modules for attribute in ADAPTER_MODULES]
        of_adapters = [[container[name] for container in containers] for name in self.names]
        self._modules = [*itertools.chain(*of_adapters)]
        self._types = [*map(type, self._modules)]
        self._dropouts = [module for module in self._modules if isinstance(module, nn.Dropout)]
        parameters = [module._parameters for a, b, _ in of_adapters for module in (a, b)]
        places = [
            *((layer._modules, attribute) for attribute in ADAPTER_MODULES),
            *itertools.product([*containers, layer.scaling], self.names),
            *itertools.product(parameters, ("weight", "bias")),
        ]
        self._dicts, self._keys = zip(*places, strict=True)
        self._parts = [*map(dict.get, self._dicts, self._keys)]
        own = [vars(module) for module in self._modules]
        self._own, self._empty = own * len(_EMPTY), [key for key in _EMPTY for _ in own]
        self._parameters = [of_module["weight"] for of_module in parameters]
        self._states = [*map(_state, self._parameters)]
        # Aliases of the parameters' memory, which no other tensor can take while they exist. It may move, though.
        self._aliases = [p.detach() for p in self._parameters]
        self._addresses = [*map(Tensor.data_ptr, self._parameters)]
        sizes = [(p if p.requires_grad else p.view(-1)[:_COMPARED]).nbytes for p in self._parameters]
        self._compared = [
            (ctypes.c_char * size).from_address(at) for size, at in zip(sizes, self._addresses, strict=True)
        ]
        self._contents = b"".join(self._compared)
        self.stack = _stack(adapters, dtype)

    def serves(self, layer: Any, names: Iterable[str], dtype: torch.dtype) -> bool:
        """Whether the stack has the adapters ``names`` of the layer as they are now, in ``dtype``, without dropout.

        Also False if PEFT's code has to run. The loops run in C: each call asks each layer about all of its adapters.
        """
        return (
            dtype == self._dtype
            and set(names).issubset(self.names)
            and layer.scaling is self._scaling
            and all(map(operator.is_, map(dict.get, self._dicts, self._keys), self._parts))
            and not any(map(dict.get, self._own, self._empty))
            and [*map(type, self._modules)] == self._types
            and not any(map(_training, self._dropouts))
            and [*map(_state, self._parameters)] == self._states
            and all(map(Tensor.is_set_to, self._parameters, self._aliases))
            and [*map(Tensor.data_ptr, self._parameters)] == self._addresses
            and b"".join(self._compared) == self._contents
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies of the layer make their own


def _can_retain(layer: Any, adapter: Adapter) -> bool:
    """Whether changes of an adapter are noticed, without waiting for a device."""
    parameters = [layer._modules[m]._modules[adapter.name]._parameters.get("weight") for m in ADAPTER_MODULES[:2]]
    return not isinstance(adapter.scaling, Tensor) and all(
        type(p) is nn.Parameter
        and p.device.type == "cpu"
        and not p.is_inference()  # it would have no version counter
        and p.is_contiguous()
        for p in parameters
    )


def _retains() -> bool:
    """Whether this call may retain a stack: without gradients, and of real tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


class StacksAdapters:
    """A mixin, placed before a PEFT layer class, for layers whose samples may have different adapters.

    On the CPU, a layer retains one stack, of the last call without gradients that stacked adapters. A call with
    gradients frees it, and so does deleting an adapter. Calls with one adapter do not, because a server may alternate
    between both.
    """

    _retained: _RetainedStack | None = None

    def runs_plain(self) -> bool:
        """Whether calling the base only runs its own code."""
        return True

    def forget_stack(self) -> None:
        if self._retained is not None:
            self._retained = None

    def retained_stack(self, names: Iterable[str], dtype: torch.dtype) -> tuple[Sequence[str], StackedAdapters] | None:
        """The retained stack and the names of its adapters; None if it lacks one of ``names`` as it is now."""
        retained = self._retained  # read once, because another thread may replace it
        if retained is None or not _retains() or not self.runs_plain() or not retained.serves(self, names, dtype):
            return None
        return retained.names, retained.stack

    def stack(self, adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[Sequence[str], StackedAdapters]:
        """A new stack of ``adapters``, and their names. Gradients reach the adapters."""
        if not torch.compiler.is_compiling():
            self.forget_stack()
        if _retains() and all(_can_retain(self, adapter) for adapter in adapters):
            self._retained = retained = _RetainedStack(self, adapters, dtype)
            return retained.names, retained.stack
        return [adapter.name for adapter in adapters], _stack(adapters, dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget_stack()  # which has the memory that is being replaced
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def delete_adapter(self, adapter_name: str) -> None:
        self.forget_stack()
        super().delete_adapter(adapter_name)  # type: ignore[misc]
