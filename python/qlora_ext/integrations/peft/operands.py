"""What the fused operator gets for the plain adapters of a call: one, several that are summed, or one per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...adapters import StackedAdapters, adapter_of_each_row, stack_adapters
from .calls import once_per_call
from .trained_weight import fold_scaling


class Adapter(NamedTuple):
    """A plain LoRA adapter of a layer: A [R, K], B [N, R], and the probability of dropout in this call."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float | Tensor
    dropout_p: float


def operands(layer: Any, x: Tensor, adapters: list[Adapter], names: Sequence[str] | None) -> tuple[Any, ...] | None:
    """The arguments of ``Linear4bit.fused_forward`` after x; None if the operator cannot compute the call.

    Args:
        layer: a ``LoraLinear4bit``.
        adapters: those of the call that the layer has.
        names: the adapter of each sample; None if all adapters are added to all samples.
    """
    if not adapters:
        return ()
    if len(adapters) == 1 and (names is None or names.count(adapters[0].name) == len(names)):
        (adapter,) = adapters
        b, scaling = fold_scaling(adapter.b, adapter.scaling)
        return adapter.a, b, scaling, adapter.dropout_p
    if any(adapter.dropout_p > 0.0 for adapter in adapters):  # PEFT draws a mask per adapter, the operator one
        return None
    dtype = layer.layer4bit.dtypes(x)[0]
    here = tuple(adapter.name for adapter in adapters)
    if names is None:
        return once_per_call((_summed, layer, here, dtype), lambda: _summed(adapters, dtype))
    if x.device.type != "cpu" or x.ndim < 2:
        return None
    stacked = once_per_call((_stacked, layer, here, dtype), lambda: _stacked(adapters, dtype))
    of_row = once_per_call((_adapter_of_row, tuple(names), here, x.shape[:-1]), lambda: _adapter_of_row(names, here, x))
    return stacked, None, 1.0, 0.0, of_row


def _summed(adapters: list[Adapter], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """One adapter that is the sum of ``adapters``: their ranks side by side.

    Different scalings are multiplied into B, in float32 or wider. This costs 16-bit layers no accuracy if B is stored
    in float32, as PEFT does by default, because B is rounded once anyway. A 16-bit B is rounded a second time, unless
    the scaling is a power of two.
    """
    a = torch.cat([adapter.a.to(dtype) for adapter in adapters])
    first = adapters[0].scaling
    if not any(isinstance(adapter.scaling, Tensor) or adapter.scaling != first for adapter in adapters):
        return a, torch.cat([adapter.b.to(dtype) for adapter in adapters], dim=1), first
    wide = torch.promote_types(dtype, torch.float32)
    scaled = [(adapter.b.to(wide) * adapter.scaling).to(dtype) for adapter in adapters]
    return a, torch.cat(scaled, dim=1), 1.0


def _stacked(adapters: list[Adapter], dtype: torch.dtype) -> StackedAdapters:
    folded = [fold_scaling(adapter.b, adapter.scaling) for adapter in adapters]
    return stack_adapters(
        [adapter.a.to(dtype) for adapter in adapters],
        [b.to(dtype) for b, _ in folded],
        [scaling for _, scaling in folded],
    )


def _adapter_of_row(names: Sequence[str], here: tuple[str, ...], x: Tensor) -> Tensor:
    place = {name: i for i, name in enumerate(here)}
    of_sample = torch.tensor([place.get(name, -1) for name in names], dtype=torch.int32, device=x.device)
    return adapter_of_each_row(of_sample, x)
