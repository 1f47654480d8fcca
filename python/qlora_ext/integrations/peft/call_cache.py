"""Calls of a PEFT model: what a call computes once for all of its layers and tokens, and its ``adapter_names``."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import _get_encoder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...nn import Experts4bit, layers_of

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


def _outer_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model without those of adapters, of which each layer may have hundreds."""
    found: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found.add(module)
            yield module
            waiting += [module.base_layer] if isinstance(module, BaseTunerLayer) else module._modules.values()


def _record_shape(modules: Sequence[nn.Module], call: dict[Hashable, Any]) -> Iterator[RemovableHandle]:
    """Adds hooks by which ``call`` knows the shape of the hidden states that a mixture of experts flattens."""

    # torch adds a hook before it notes that the hook takes keywords: another thread's call in between passes none.
    def record(_: nn.Module, args: Any, kwargs: Any = None) -> None:
        if _computed.get() is call:  # not another thread's call
            hidden = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            call[samples_of_call] = hidden.shape[:2] if hidden is not None and hidden.ndim == 3 else None

    of_experts = ParamWrapper, Experts4bit
    for module in modules:
        if not isinstance(module, of_experts) and any(isinstance(child, of_experts) for child in module.children()):
            yield module.register_forward_pre_hook(record, with_kwargs=True)


def _choose(call: Any, names: Sequence[str], module: nn.Module, args: Any, kwargs: Any = None) -> Any:
    """The hook that passes ``adapter_names`` to a layer, which other calls may be running too (see ``record``)."""
    if _computed.get() is not call:
        return None
    if isinstance(module, AuxiliaryTrainingWrapper):  # it fails for adapters without a copy of the module
        names = [name if name in module._adapters else "__base__" for name in names]
    return args, {**kwargs, "adapter_names": names}


def _pass_names(
    tuner: Any, modules: Sequence[nn.Module], names: Sequence[str], beams: int, call: Any
) -> Iterator[RemovableHandle]:
    """Adds hooks that pass the names of a call to its layers, repeated for each beam, except in an encoder."""
    encoder = _get_encoder(tuner.model)
    encoding = set() if encoder is None else {*encoder.modules()}
    repeated = [name for name in names for _ in range(beams)]
    for module in modules:
        if isinstance(module, tuner.tuner_layer_cls | AuxiliaryTrainingWrapper):
            choose = functools.partial(_choose, call, names if module in encoding else repeated)
            yield module.register_forward_pre_hook(choose, with_kwargs=True)


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
    tuner: Any, hooks: contextlib.AbstractContextManager[None], names: Sequence[str] | None, beams: int, by_sample: bool
) -> Iterator[None]:
    call: dict[Hashable, Any] = {}
    modules = [*_outer_modules(tuner)] if by_sample else []
    with _lock:  # torch numbers hooks without one, and two of the same number would replace each other
        hooks.__enter__()
        handles = [*_record_shape(modules, call)]
        handles += [] if names is None else _pass_names(tuner, modules, names, beams, call)
    tokens = _computed.set(call), _by_sample.set(by_sample)
    try:
        with _eagerly() if by_sample and "torch._dynamo" in sys.modules else contextlib.nullcontext():
            yield
    finally:
        _computed.reset(tokens[0])
        _by_sample.reset(tokens[1])
        for handle in handles:
            handle.remove()
        # Without the exception: PEFT would leave its hooks in place, and later calls would run with its arguments.
        hooks.__exit__(None, None, None)


class PerSample:
    """A mixin, placed before the class of a PEFT method, for adapters per sample (``adapter_names``).

    PEFT passes the names of one thread's call to the calls of other threads too, and retains those of a call that
    raised. It ignores names for most methods.
    """

    takes_names: bool  # whether PEFT's method does
    model: nn.Module
    training: bool

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        names = kwargs.get("adapter_names")
        if not self.takes_names:
            if names is not None and any(True for _ in layers_of(self.model)):
                method = type(self).__name__
                raise ValueError(
                    f"adapter_names: expected a method with adapters per sample, such as LoRA, got {method}"
                )
            return contextlib.nullcontext()
        enable: Any = super()._enable_peft_forward_hooks  # type: ignore[misc]
        if torch.compiler.is_compiling() or (names is not None and not self._serves(names)):  # which PEFT rejects
            hooks: contextlib.AbstractContextManager[None] = enable(*args, **kwargs)
            return hooks
        by_sample = names is not None or kwargs.get("alora_offsets") is not None
        hooks = enable(*args, **{**kwargs, "adapter_names": None})
        return _one_call(self, hooks, names, kwargs.get("num_beams") or 1, by_sample)

    def _serves(self, names: Sequence[str]) -> bool:
        missing = {*names} - {"__base__"}
        for module in _outer_modules(self.model):
            if self.training or not missing:
                break
            if isinstance(module, BaseTunerLayer):
                missing -= module._get_available_adapters()
        return not self.training and not missing
