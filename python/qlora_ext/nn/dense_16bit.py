"""Dense layers whose frozen weights keep 16 bits in a model that computes in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..linear_dense import linear
from .conversions import CONVERSIONS
from .dense_modules import dense_modules, paths_to
from .embedding import is_scaled
from .linear import Linear4bit

Self = TypeVar("Self", bound="Dense16bit")


class Dense16bit(nn.Module):
    """What ``Linear16bit`` and ``Embedding16bit`` share.

    Attributes:
        compute_dtype: of the model around the layer. PEFT keeps adapters on the layer in it.
        dense_class: the class of the layer in a model that computes in the dtype of its weights.
    """

    compute_dtype: torch.dtype = torch.float32
    dense_class: ClassVar[type[nn.Module]]

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        return self


class Linear16bit(Dense16bit, nn.Linear):
    """An ``nn.Linear`` that multiplies x in float32 by a frozen weight in bfloat16 or float16, without copying it.

    It serves x in float32, and on a CPU without bfloat16 arithmetic x in bfloat16. Otherwise, for example if the weight
    is trained, it is an ``nn.Linear`` that casts x and its weight to the wider of their dtypes.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).bfloat16()
        >>> model = qlora_ext.nn.set_compute_dtype(qlora_ext.quantize_model(model, skip=("1",)), torch.float32)
        >>> model[1].weight.dtype, model(torch.randn(3, 64)).dtype
        (torch.bfloat16, torch.float32)
    """

    dense_class = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding16bit(Dense16bit, nn.Embedding):
    """An ``nn.Embedding`` that returns rows of a frozen 16-bit table in the dtype in which the model computes.

    Rows are multiplied by the attribute ``embed_scale`` of embeddings that have one, such as Gemma's.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64)).bfloat16()
        >>> model = qlora_ext.nn.set_compute_dtype(qlora_ext.quantize_model(model), torch.float32)
        >>> model[0].weight.dtype, model[0](torch.tensor([5])).dtype
        (torch.bfloat16, torch.float32)
    """

    dense_class = nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.Embedding.forward(self, ids).to(self.compute_dtype)
        scale: Tensor | float | None = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale


CONVERSIONS[Linear16bit] = Linear4bit


@functools.cache
def _keeping(kind: Any) -> type[Dense16bit] | None:
    """The class that keeps the 16-bit weights of layers of the class ``kind``; None if there is none."""
    if issubclass(kind, Dense16bit):
        same: type[Dense16bit] = kind
        return same
    if kind is nn.Linear:
        return Linear16bit
    if kind is nn.Embedding:
        return Embedding16bit
    if issubclass(kind, nn.Embedding) and is_scaled(kind):
        # A subclass of ``kind``, because other code may ask for its class.
        return type(f"{kind.__name__}16bit", (Embedding16bit, kind), {"dense_class": kind})
    return None


def widen(module: nn.Module) -> None:
    """Casts the 16-bit weights in ``module`` to the dtype in which the model computes.

    Weights that training or merging changes need it, because 16 bits lose small updates.
    """
    for layer in module.modules():
        if isinstance(layer, Dense16bit):
            weight = layer.get_parameter("weight")
            weight.data = weight.data.to(layer.compute_dtype)


def kept_in_16bit(model: nn.Module) -> dict[nn.Module, type[Dense16bit]]:
    """The modules of ``model`` whose weights can stay in 16 bits, with the classes that keep them.

    No other module may share such a weight, or read it itself.
    """
    always = {*dense_modules(model).always}
    others: set[nn.Parameter | None] = set()
    kept: dict[nn.Module, type[Dense16bit]] = {}
    for name, module in model.named_modules():
        cls: Any = type(module)
        weight, kind = module._parameters.get("weight"), _keeping(cls)
        is_narrow = weight is not None and weight.dtype in (torch.bfloat16, torch.float16) and not weight.is_cuda
        if is_narrow and kind is not None and always.isdisjoint(paths_to(name)):
            kept[module] = kind
        else:
            others.update(module._parameters.values())
    return {module: kind for module, kind in kept.items() if module.weight not in others}


def to_dense_classes(model: nn.Module) -> None:
    """Gives the layers of ``model`` that keep 16 bits the classes that they had before. Weights do not change."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Dense16bit)]
    for layer in layers:
        layer.__class__ = layer.dense_class
