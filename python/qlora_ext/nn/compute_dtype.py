"""How a 4-bit model computes: changes its dtype, for the whole model, for its 4-bit or for its dense layers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..formats import EXACT
from ..weight import Weight4bit
from .dense_16bit import Dense16bit, Linear16bit, kept_in_16bit
from .embedding import Embedding4bit, TiedLinear4bit
from .packed import layers_of


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
    kept = kept_in_16bit(model) if dtype == torch.float32 else {}
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


def multiply_in_float32(model: nn.Module) -> None:
    """Makes the dense bfloat16 linear layers of ``model`` multiply in float32, on a CPU without bfloat16 arithmetic.

    Their inputs and outputs stay in bfloat16.
    """
    for module, kind in kept_in_16bit(model).items():
        if kind is Linear16bit:
            module.__class__ = kind
            vars(module)["compute_dtype"] = module.get_parameter("weight").dtype


def multiply_in_bfloat16(model: nn.Module) -> None:
    """Makes the 4-bit layers of a model that computes in float32 multiply in bfloat16.

    Between layers, values stay in float32. So do quantized embeddings with the heads that are tied to them, and layers
    whose weights integer products do not serve: those of more than 4 bits, those with blocks of 16 elements, and those
    with offsets and other codes than integers. A later ``model.float()`` undoes it.

    Example:
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48)))
        >>> qlora_ext.nn.multiply_in_bfloat16(model)
        >>> model[0].compute_dtype, model(torch.randn(3, 64)).dtype
        (torch.bfloat16, torch.float32)
    """
    for _, layer in layers_of(model):
        is_served = all(
            form.bits == 4 and form.block_size >= 32 and (form.offsets is None or form.code in ("int4", "uint4"))
            for form in layer.forms.values()
        )
        if is_served and not isinstance(layer, Embedding4bit | TiedLinear4bit):
            layer.compute_dtype = torch.bfloat16


def activations_of(model: nn.Module) -> str:
    """``activations`` of the first 4-bit layer of ``model``.

    Example:
        >>> qlora_ext.nn.activations_of(qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48)), activations="int8"))
        'int8'
    """
    return next((layer.activations for _, layer in layers_of(model)), EXACT)


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
