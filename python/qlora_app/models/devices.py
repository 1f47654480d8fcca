"""Parses ``--dtype`` and ``--device``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qlora_ext.dtype_names import AUTO as AUTO
from qlora_ext.dtype_names import check_name, dtype_named
from qlora_ext.dtype_names import name_of as name_of

from ..errors import UserError

if TYPE_CHECKING:
    import torch


def check_dtype(name: str) -> None:
    """Checks a ``--dtype``.

    Raises:
        UserError: ``name`` is not the name of a dtype.
    """
    try:
        check_name(name)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of the dense weights for a value of ``--dtype``; "auto" is bfloat16, the dtype of most checkpoints."""
    check_dtype(name)
    return dtype_named(name)


def parse_computing_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype on ``device`` for the value of ``--dtype``.

    With "auto", a CPU without bfloat16 arithmetic computes in float32 and such a GPU in float16, with the same weights
    and 4-bit codes as other machines, so an adapter trained on one fits the other.

    Raises:
        UserError: ``name`` is not the name of a dtype, or the device does not compute in it.
    """
    import torch

    from qlora_ext.dtypes import computing_dtype_named, gpu_without_bfloat16

    check_dtype(name)
    dtype = computing_dtype_named(name, device)
    if dtype == torch.bfloat16 and gpu_without_bfloat16(device):
        raise UserError(
            f"--dtype {name}: {torch.cuda.get_device_name(device)} has no bfloat16 arithmetic; use float16 or float32"
        )
    return dtype


def parse_device(name: str) -> torch.device:
    """The device for a value of ``--device``. "auto" is CUDA if torch finds a device and our kernels support it."""
    import torch

    from qlora_ext import build_info

    info = build_info()
    if name == "auto":
        return torch.device("cuda" if info["cuda_available"] else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not info["cuda_available"]:
        raise UserError(f"--device {name}: no CUDA here ({info['cuda_error'] or 'torch finds no device'})")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device
