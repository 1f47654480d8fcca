"""Dense layers whose frozen weights keep 16 bits in a model that computes in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dense import linear
from .conversions import CONVERSIONS
from .dense_modules import dense_modules, paths_to
from .linear import Linear4bit


class Linear16bit(nn.Linear):
    """An ``nn.Linear`` that multiplies x in float32 by a frozen weight in bfloat16 or float16, without copying it.

    It serves x in float32, and on a CPU without bfloat16 arithmetic x in bfloat16. Otherwise, for example if the weight
    is trained, it is an ``nn.Linear`` that casts x and its weight to the wider of their dtypes.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).bfloat16()
        >>> model = qlora_ext.nn.set_compute_dtype(qlora_ext.quantize_model(model, skip=("1",)), torch.float32)
        >>> model[1].weight.dtype, model(torch.randn(3, 64)).dtype
        (torch.bfloat16, torch.float32)
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding16bit(nn.Embedding):
    """An ``nn.Embedding`` that returns rows of a frozen 16-bit table in another dtype, ``compute_dtype``.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64)).bfloat16()
        >>> model = qlora_ext.nn.set_compute_dtype(qlora_ext.quantize_model(model), torch.float32)
        >>> model[0].weight.dtype, model[0](torch.tensor([5])).dtype
        (torch.bfloat16, torch.float32)
    """

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.compute_dtype)


# Which dense layers can keep 16-bit weights. Subclasses may use their weights in other ways.
_KEEPING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear16bit,
    nn.Embedding: Embedding16bit,
    Linear16bit: Linear16bit,
    Embedding16bit: Embedding16bit,
}
CONVERSIONS[Linear16bit] = Linear4bit


def widen_trained(module: nn.Module) -> None:
    """Casts the weights of 16-bit layers in ``module`` to float32, to train them: in 16 bits, small updates are lost.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).bfloat16()
        >>> model = qlora_ext.nn.set_compute_dtype(qlora_ext.quantize_model(model, skip=("1",)), torch.float32)
        >>> qlora_ext.nn.widen_trained(model[1])
        >>> model[1].weight.dtype
        torch.float32
    """
    for layer in module.modules():
        if isinstance(layer, Linear16bit | Embedding16bit):
            layer.weight.data = layer.weight.data.float()


def multiply_in_float32(model: nn.Module) -> None:
    """Makes the dense bfloat16 linear layers of ``model`` multiply in float32, on a CPU without bfloat16 arithmetic.

    Their inputs and outputs stay in bfloat16.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)).bfloat16()
        >>> qlora_ext.nn.multiply_in_float32(qlora_ext.quantize_model(model, skip=("1",)))
        >>> type(model[1]).__name__
        'Linear16bit'
    """
    for module in _kept(model):
        if isinstance(module, nn.Linear):
            module.__class__ = Linear16bit


def _kept(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` whose weights can stay in 16 bits: no other module shares them, or reads them itself."""
    always = {*dense_modules(model).always}
    others: set[nn.Parameter | None] = set()
    kept: list[nn.Module] = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_narrow = weight is not None and weight.dtype in (torch.bfloat16, torch.float16) and not weight.is_cuda
        if is_narrow and type(module) in _KEEPING and always.isdisjoint(paths_to(name)):
            kept.append(module)
        else:
            others.update(module._parameters.values())
    return [module for module in kept if module.weight not in others]


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Makes a 4-bit model compute in ``dtype``, without a float32 copy of its large dense weights on the CPU.

    4-bit layers compute in ``dtype``, and other floating-point tensors are cast to it. If it is float32, the 16-bit
    weights of dense linear layers and of embeddings keep their dtype, and are frozen.

    Returns:
        ``model``, changed in place.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 100))
        >>> model = qlora_ext.quantize_model(model.bfloat16(), skip=("3",))
        >>> model = qlora_ext.nn.set_compute_dtype(model, torch.float32)
        >>> model(torch.tensor([5])).dtype, model[0].weight.dtype, model[2].weight.dtype, model[3].weight.dtype
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
    """
    kept = _kept(model) if dtype == torch.float32 else []
    weights = [module.get_parameter("weight") for module in kept]
    for module in kept:
        module._parameters["weight"] = None
    model.to(dtype)
    for module, weight in zip(kept, weights, strict=True):
        weight.requires_grad_(False)
        module._parameters["weight"] = weight
        module.__class__ = _KEEPING[type(module)]
        if isinstance(module, Embedding16bit):
            module.compute_dtype = dtype
    return model
