"""Calls of a PEFT model: what a call computes once for all of its layers and tokens, and its ``adapter_names``."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...nn import Experts4bit, layers_of
from .._patches import extend

Result = TypeVar("Result")

# What the current call of a PEFT model has computed; None outside of a call.
_computed: ContextVar[dict[Hashable, Any] | None] = ContextVar("_computed", default=None)
# Whether the current call has one of the arguments that PEFT passes to layers by hooks.
_by_sample: ContextVar[bool] = ContextVar("_by_sample", default=False)
_lock = threading.Lock()
# One entry per call that runs compiled code eagerly, in all threads.
_eager_calls: list[Any] = []


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
    """Whether the current call of a PEFT model has ``adapter_names``, or aLoRA's offsets."""
    return not torch.compiler.is_compiling() and _by_sample.get()


def samples_of_call(layer: nn.Module, x: Tensor) -> Tensor:
    """x with a first dimension for the samples, in a call with ``adapter_names``.

    Mixtures of experts flatten hidden states [samples, tokens, features] to [samples · tokens, features] before they
    call experts, shared experts and routers.

    Args:
        x: what ``layer`` got.

    Raises:
        ValueError: nothing tells which rows belong to a sample.
    """
    if x.ndim != 2:
        return x
    shape: torch.Size | None = (_computed.get() or {}).get(samples_of_call)
    if shape is not None and len(x) == shape.numel():
        return x.view(*shape, x.shape[1])
    if isinstance(layer, ParamWrapper):
        raise ValueError(
            f"adapter_names: adapters on {layer.parameter_name} need a model that passes them all tokens of hidden "
            f"states [samples, tokens, features], got {list(x.shape)} of {None if shape is None else [*shape]}; "
            "activate the adapter with set_adapter instead"
        )
    return x  # PEFT compares its length with the number of names


def _record_shape(model: nn.Module, call: dict[Hashable, Any]) -> Iterator[RemovableHandle]:
    """Adds hooks by which ``call`` knows the shape of the hidden states that a mixture of experts flattens."""

    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        if _computed.get() is call:  # not another thread's call
            hidden = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            call[samples_of_call] = hidden.shape[:2] if hidden is not None and hidden.ndim == 3 else None

    of_experts = ParamWrapper, Experts4bit
    for module in model.modules():
        if not isinstance(module, of_experts) and any(isinstance(child, of_experts) for child in module.children()):
            yield module.register_forward_pre_hook(record, with_kwargs=True)


class _Name(str):
    """An adapter's name among the ``adapter_names`` of a call, which it knows by what the call has computed."""

    call: dict[Hashable, Any]


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Runs compiled code eagerly, for calls whose arguments are in hooks: Dynamo does not notice when those change."""
    with _lock:
        try:
            _eager_calls.append(None if _eager_calls else torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise ValueError(
                "adapter_names: expected a PeftModel that is not compiled; compile model.base_model.model instead, "
                "which then runs eagerly with adapter_names"
            ) from error
    try:
        yield
    finally:
        with _lock:
            stance = _eager_calls.pop()
            if stance is not None:  # of the first call, which is popped after all others
                stance.__exit__(None, None, None)


@contextlib.contextmanager
def _one_call(
    model: nn.Module, hooks: contextlib.AbstractContextManager[None], call: dict[Hashable, Any], by_sample: bool
) -> Iterator[None]:
    with _lock:  # torch numbers hooks without one, and two of the same number would replace each other
        hooks.__enter__()
        handles = [*_record_shape(model, call)] if by_sample else []
    tokens = _computed.set(call), _by_sample.set(by_sample)
    try:
        with _eagerly() if by_sample and "torch._dynamo" in sys.modules else contextlib.nullcontext():
            yield
    finally:
        _computed.reset(tokens[0])
        _by_sample.reset(tokens[1])
        call.clear()  # its keys are names, which refer to it
        for handle in handles:
            handle.remove()
        # Without the exception: PEFT would leave its hooks in place, and later calls would run with these names.
        hooks.__exit__(None, None, None)


@extend("peft.peft_model:PeftModel._enable_peft_forward_hooks")
def _enable_peft_forward_hooks(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    names = kwargs.get("adapter_names")
    ignored = names is not None and not hasattr(self.base_model, "_enable_peft_forward_hooks")
    if ignored and any(True for _ in layers_of(self)):
        method = type(self.base_model).__name__
        raise ValueError(f"adapter_names: expected a method with adapters per sample, such as LoRA, got {method}")
    if torch.compiler.is_compiling():
        return original(self, *args, **kwargs)
    call: dict[Hashable, Any] = {}
    if names is not None:
        kwargs["adapter_names"] = [_Name(name) for name in names]
        for name in kwargs["adapter_names"]:
            name.call = call
    by_sample = names is not None or kwargs.get("alora_offsets") is not None
    return _one_call(self, original(self, *args, **kwargs), call, by_sample)


@extend("peft.tuners.lora.model:_adapter_names_pre_forward_hook")
def _adapter_names_pre_forward_hook(
    original: Any, target: Any, args: Any, kwargs: Any = None, *, adapter_names: Any
) -> Any:
    # The hook is on the layer, which other threads may be calling too, and also calls inside of this call.
    first = adapter_names[0] if adapter_names else None
    if isinstance(first, _Name) and not torch.compiler.is_compiling() and first.call is not _computed.get():
        return None
    return original(target, args, kwargs, adapter_names)


@extend("peft.utils.other:AuxiliaryTrainingWrapper.forward")
def _forward_of_trained_copies(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    names = kwargs.get("adapter_names")
    if names is None or self.disable_adapters:
        return original(self, *args, **kwargs)
    kwargs["adapter_names"] = [name if name in self._adapters else "__base__" for name in names]
    self._check_forward_args(*args, **kwargs)
    return self._mixed_batch_forward(*args, **kwargs)
