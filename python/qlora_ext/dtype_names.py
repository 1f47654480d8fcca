"""Names of dtypes as users type them: bf16, half, float32, or auto."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AUTO = "auto"
_NAMES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
}


def check_name(name: str) -> None:
    """Raises a ValueError unless ``name`` is "auto" or the name of a compute dtype."""
    if name not in (AUTO, *_NAMES):
        raise ValueError(f"dtype {name}: expected {AUTO}, bfloat16, float16 or float32")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16, the dtype of most checkpoints."""
    import torch

    check_name(name)
    dtype: torch.dtype = getattr(torch, _NAMES.get(name, "bfloat16"))
    return dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
