"""Dense layers whose frozen weights keep 16 bits in a model that computes in float32."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..dense import linear
from ..weight import Weight4bit
from .conversions import CONVERSIONS
from .dense_modules import dense_modules, paths_to
from .linear import Linear4bit
from .packed import layers_of

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
    if issubclass(kind, nn.Embedding) and _is_scaled(kind):
        # A subclass of ``kind``, because other code may ask for its class.
        return type(f"{kind.__name__}16bit", (Embedding16bit, kind), {"dense_class": kind})
    return None


def _is_scaled(kind: type[nn.Embedding]) -> bool:
    """Whether embeddings of the class ``kind`` multiply the rows of the table by ``embed_scale``, and do nothing else.

    This is tried with a small table. Other subclasses may use their table in any way.
    """
    with torch.inference_mode(False), torch.no_grad():
        table = torch.arange(12, dtype=torch.float32, device="cpu").view(4, 3)
        ids = torch.tensor([[2, 0], [3, 2]], dtype=torch.int64, device="cpu")
        scale = torch.tensor(3, dtype=torch.float32, device="cpu")
        probe: Any = kind.__new__(kind)
        vars(probe).update(vars(nn.Embedding(4, 3, device="meta")), _parameters={}, weight=table, embed_scale=scale)
        try:
            return torch.equal(probe(ids), table[ids] * scale)
        except Exception:  # an arbitrary forward
            return False


def widen(module: nn.Module) -> None:
    """Casts the 16-bit weights in ``module`` to the dtype in which the model computes.

    Weights that training or merging changes need it, because 16 bits lose small updates.
    """
    for layer in module.modules():
        if isinstance(layer, Dense16bit):
            weight = layer.get_parameter("weight")
            weight.data = weight.data.to(layer.compute_dtype)


def multiply_in_float32(model: nn.Module) -> None:
    """Makes the dense bfloat16 linear layers of ``model`` multiply in float32, on a CPU without bfloat16 arithmetic.

    Their inputs and outputs stay in bfloat16.
    """
    for module, kind in _kept(model).items():
        if kind is Linear16bit:
            module.__class__ = kind
            vars(module)["compute_dtype"] = module.get_parameter("weight").dtype


def _kept(model: nn.Module) -> dict[nn.Module, type[Dense16bit]]:
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


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Makes a 4-bit model compute in ``dtype``, without a float32 copy of its large dense weights on the CPU.

    4-bit layers compute in ``dtype``, and other floating-point tensors are cast to it. If it is float32, the 16-bit
    weights of dense linear layers and of embeddings keep their dtype, and are frozen. So do decoded 4-bit weights.

    Returns:
        ``model``, changed in place.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 100))
        >>> model = qlora_ext.quantize_model(model.bfloat16(), skip=("3",))
        >>> model = qlora_ext.nn.set_compute_dtype(model, torch.float32)
        >>> model(torch.tensor([5])).dtype, model[0].weight.dtype, model[2].weight.dtype, model[3].weight.dtype
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
    """
    kept = _kept(model) if dtype == torch.float32 else {}
    weights = {module: module.get_parameter("weight") for module in kept}
    decoded = {layer: layer.weight_dtype for _, layer in layers_of(model)} if dtype == torch.float32 else {}
    for module, kind in kept.items():
        module.__class__ = kind
        module._parameters["weight"] = None
    model.to(dtype)
    for module, weight in weights.items():
        weight.requires_grad_(False)
        module._parameters["weight"] = weight
    for layer, weight_dtype in decoded.items():
        layer.weight_dtype = weight_dtype
    return model


def to_dense_classes(model: nn.Module) -> None:
    """Gives the layers of ``model`` that keep 16 bits the classes that they had before. Weights do not change."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Dense16bit)]
    for layer in layers:
        layer.__class__ = layer.dense_class


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Makes ``model`` compute in ``dtype`` inside the ``with`` statement, and then restores all its dtypes.

    4-bit layers compute in ``dtype``, and tensors with a narrower floating dtype are cast to it. Wider tensors, packed
    states, and 16-bit weights of a model that computes in ``dtype`` do not change. Layers that are replaced meanwhile
    are not restored.

    Example:
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48)).bfloat16())
        >>> with qlora_ext.nn.computing_in(model, torch.float32):
        ...     y = model(torch.ones(64))
        >>> y.dtype, model[0].compute_dtype
        (torch.float32, torch.bfloat16)
    """
    layers = {layer: layer.compute_dtype for _, layer in layers_of(model)}
    stored = {id(t) for layer in layers for t in layer.packed_state().values()}  # exposed scales may be float16
    for module in model.modules():
        if isinstance(module, Dense16bit) and module.compute_dtype == dtype:
            stored.add(id(module.get_parameter("weight")))
    tensors = {
        name: t.dtype
        for name, t in _tensors_of(model)
        if t.is_floating_point()
        and t.itemsize < dtype.itemsize
        and not isinstance(t, Weight4bit)
        and id(t) not in stored
    }
    for layer in layers:
        layer.compute_dtype = dtype
    for name, t in _tensors_of(model):
        if name in tensors:
            t.data = t.data.to(dtype)
    try:
        yield
    finally:
        for name, t in _tensors_of(model):
            if name in tensors and t.is_floating_point():
                t.data = t.data.to(tensors[name])
        for layer, before in layers.items():
            layer.compute_dtype = before


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
