"""Calls of a PEFT model: what a call computes once for all of its layers and tokens, and its ``adapter_names``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from ...nn import layers_of
from .._patches import extend

Result = TypeVar("Result")

# What the current call of a PEFT model has computed; None outside of a call.
_computed: ContextVar[dict[Hashable, Any] | None] = ContextVar("_computed", default=None)
# Whether the current call has ``adapter_names``.
_by_sample: ContextVar[bool] = ContextVar("_by_sample", default=False)


def once_per_call(key: Hashable, compute: Callable[[], Result]) -> Result:
    """``compute()``, which within one forward or ``generate`` of a PEFT model runs once per ``key``.

    Results do not outlive the call, because nothing tells when adapters change between two calls: many programs write
    to ``parameter.data``. With gradients every layer computes anew, because a result belongs to one graph.
    """
    if torch.compiler.is_compiling():  # Dynamo cannot trace context variables
        return compute()
    computed = None if torch.is_grad_enabled() else _computed.get()
    if computed is None:
        return compute()
    if key not in computed:
        computed[key] = compute()
    result: Result = computed[key]
    return result


def chooses_adapters_by_sample() -> bool:
    """Whether the current call of a PEFT model has ``adapter_names``."""
    return not torch.compiler.is_compiling() and _by_sample.get()


@contextlib.contextmanager
def _one_call(hooks: contextlib.AbstractContextManager[None], by_sample: bool) -> Iterator[None]:
    hooks.__enter__()
    tokens = _computed.set({}), _by_sample.set(by_sample)
    try:
        yield
    finally:
        _computed.reset(tokens[0])
        _by_sample.reset(tokens[1])
        # Without the exception: PEFT would leave its hooks in place, and later calls would run with these names.
        hooks.__exit__(None, None, None)


@extend("peft.peft_model:PeftModel._enable_peft_forward_hooks")
def _enable_peft_forward_hooks(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    by_sample = kwargs.get("adapter_names") is not None
    if by_sample and not hasattr(self.base_model, "_enable_peft_forward_hooks") and any(True for _ in layers_of(self)):
        method = type(self.base_model).__name__
        raise ValueError(f"adapter_names: expected a method with adapters per sample, such as LoRA, got {method}")
    hooks = original(self, *args, **kwargs)
    return hooks if torch.compiler.is_compiling() else _one_call(hooks, by_sample)
