"""The state of a 4-bit model in bitsandbytes' form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...nn import SCALES, Linear4bit, Packed4bit, TiedLinear4bit


def state_dict(model: nn.Module, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The state of a 4-bit model as bitsandbytes would have it, which needs bitsandbytes and not us to load.

    The model's own ``state_dict()`` has the names and shapes of its parameters, by which FSDP2, torch's distributed
    checkpoints and accelerate's offloading find them; bitsandbytes' form has others.

    Args:
        model: any module whose 4-bit modules are linear layers; of a sharded one, every rank has to ask.
        storage: the dtype that packed bytes pose as, as in ``bnb_4bit_quant_storage``.

    Returns:
        For a layer ``name``: ``name.weight`` [N·K/2 bytes, 1] in ``storage``, with ``.absmax``, ``.quant_map``,
        ``.quant_state.bitsandbytes__nf4`` and, double quantized, ``.nested_absmax`` and ``.nested_quant_map``. What is
        not 4-bit is as in ``model.state_dict()``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``storage`` no dtype.
        ValueError: a 4-bit layer of a kind that bitsandbytes lacks, or a number of bytes that makes no whole elements.

    Example:
        >>> from qlora_ext.integrations.bitsandbytes import state_dict
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48)))
        >>> state_dict(model)["0.weight"].shape
        torch.Size([1536, 1])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(storage, torch.dtype):
        raise TypeError(f"storage: expected a torch.dtype, got {type(storage).__name__}")
    state: dict[str, Tensor] = model.state_dict()
    for name, layer in model.named_modules(remove_duplicate=False):  # a state has a shared layer under all its names
        if not isinstance(layer, Packed4bit):
            continue
        if not isinstance(layer, Linear4bit) or isinstance(layer, TiedLinear4bit):
            raise ValueError(
                f"{name or 'model'}: expected 4-bit linear layers, the only kind that bitsandbytes has, "
                f"got {type(layer).__name__}"
            )
        prefix = f"{name}." if name else ""
        for key in ("weight", *SCALES):
            state.pop(f"{prefix}{key}", None)
        weight = f"{prefix}weight"
        tensors = layer.weight4bit.to_bitsandbytes(weight)
        packed = tensors[weight]
        if packed.numel() % storage.itemsize:
            raise ValueError(f"{name or 'model'}: expected whole elements of {storage}, got {packed.numel()} bytes")
        state |= tensors | {weight: packed.reshape(-1).view(storage).reshape(-1, 1)}
    return state
