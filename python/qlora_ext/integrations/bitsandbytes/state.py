"""The state of a 4-bit model in bitsandbytes' format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...nn import SCALES, Linear4bit, Packed4bit, TiedLinear4bit


def state_dict(model: nn.Module, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The state of a 4-bit model in bitsandbytes' format, which loads with bitsandbytes alone.

    The model's own ``state_dict()`` has the names and shapes of its parameters, as FSDP2, torch's distributed
    checkpoints and accelerate's offloading require. bitsandbytes' format has other names and shapes.

    Args:
        model: any module whose 4-bit modules are linear layers. For a sharded model, every rank has to call this.
        storage: the dtype as which packed bytes are viewed, as in ``bnb_4bit_quant_storage``.

    Returns:
        For a layer ``name``: ``name.weight`` [N·K/2 bytes, 1] in ``storage``, with ``.absmax``, ``.quant_map``,
        ``.quant_state.bitsandbytes__nf4`` (``fp4`` for that code) and, with double quantization, ``.nested_absmax`` and
        ``.nested_quant_map``. Dense tensors are as in ``model.state_dict()``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``storage`` is not a dtype.
        ValueError: a 4-bit layer is of a kind that bitsandbytes lacks, or its number of bytes is not a multiple of the
            size of ``storage``.

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
    for name, layer in model.named_modules(remove_duplicate=False):  # state dicts list shared layers under all names
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
