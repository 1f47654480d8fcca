"""What the fused operator gets for the plain adapters of a call: one, the sum of several, or one per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapters import adapter_of_each_row
from ...merging.merge_aware import fold_scaling
from .call_cache import once_per_call
from .stacks import Adapter

# The arguments of ``Linear4bit.fused_forward`` after x.
Operands = tuple[Any, ...]


def _alone(adapter: Adapter) -> Operands:
    return adapter.a, *fold_scaling(adapter.b, adapter.scaling), adapter.dropout_p


def _draws(adapters: list[Adapter]) -> bool:
    """Whether one of several adapters has dropout. PEFT draws a mask for each, the operator one for all."""
    return any(adapter.dropout_p > 0.0 for adapter in adapters)


def added(layer: Any, x: Tensor, adapters: list[Adapter]) -> Operands | None:
    """The operands if all ``adapters`` of a layer are added to all rows; None if PEFT's code has to run."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        layer.forget_stack()
    if len(adapters) == 1:
        return _alone(adapters[0])
    if not adapters:
        return ()
    if _draws(adapters):
        return None
    dtype = layer.layer4bit.dtypes(x)[0]
    key = added, layer, dtype, *(adapter.name for adapter in adapters)
    return once_per_call(key, lambda: _sum(adapters, dtype))


def _sum(adapters: list[Adapter], dtype: torch.dtype) -> Operands:
    """One adapter that is the sum of ``adapters``: their ranks side by side.

    Different scalings are multiplied into B, in float32 or wider. This costs 16-bit layers no accuracy if B is stored
    in float32, as PEFT does by default, because B is rounded once anyway. A 16-bit B is rounded a second time, unless
    the scaling is a power of two.
    """
    a = torch.cat([adapter.a.to(dtype) for adapter in adapters], dim=-2)
    first = adapters[0].scaling
    if not any(isinstance(adapter.scaling, Tensor) or adapter.scaling != first for adapter in adapters):
        return a, torch.cat([adapter.b.to(dtype) for adapter in adapters], dim=-1), first
    wide = torch.promote_types(dtype, torch.float32)
    scaled = [(adapter.b.to(wide) * adapter.scaling).to(dtype) for adapter in adapters]
    return a, torch.cat(scaled, dim=-1), 1.0


def by_sample(layer: Any, x: Tensor, names: Sequence[str]) -> Operands | None:
    """The operands if ``names`` are the adapters of the samples of x; None if PEFT's code has to run."""
    dtype = layer.layer4bit.dtypes(x)[0]
    key = by_sample, layer, dtype, x.shape[:-1], *names
    return once_per_call(key, lambda: _by_sample(layer, x, names, dtype))


def _by_sample(layer: Any, x: Tensor, names: Sequence[str], dtype: torch.dtype) -> Operands | None:
    adapters_here = layer.lora_A._modules  # ModuleDict is slower
    here = [name for name in dict.fromkeys(names) if name in adapters_here]
    mixes = len({*names}) > 1 and x.ndim > 1
    found = layer.retained_stack(here, dtype) if mixes and here else None
    if found is None:
        adapters: list[Adapter] | None = layer.plain_adapters(here)
        if adapters is None:
            return None
        if not adapters:
            return ()
        if all(name == here[0] for name in names):
            return _alone(adapters[0])
        if _draws(adapters) or x.ndim < 2:
            return None
        found = once_per_call((layer, dtype, *here), lambda: layer.stack(adapters, dtype))
    stacked, stack = found
    key = _adapter_of_row, (*stacked,), x.shape[:-1], *names
    return stack, None, 1.0, 0.0, once_per_call(key, lambda: _adapter_of_row(names, stacked, x))


def _adapter_of_row(names: Sequence[str], stacked: Sequence[str], x: Tensor) -> Tensor:
    of_sample = [stacked.index(name) if name in stacked else -1 for name in names]
    return adapter_of_each_row(torch.tensor(of_sample, dtype=torch.int32, device=x.device), x)
