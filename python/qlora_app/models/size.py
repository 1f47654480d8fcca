"""The size of a quantized model, and its coverage."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dense_share(model: Any) -> str | None:
    """A line about linear weights that stayed dense without being requested to; None if there are at most 1%."""
    from qlora_ext.nn import coverage

    found = coverage(model)
    return f"linear  {found}" if found.exceeds_tolerance else None


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """A model's size: the number of parameters, their bytes, and the bits of its packed weights, in words."""

    parameters: int
    bytes: int
    bits: str

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """The bytes of the same parameters, all of them dense in ``dtype``."""
        return self.parameters * dtype.itemsize


def model_size(model: Any) -> ModelSize:
    """The size of a quantized model's weights. A tensor that several modules share counts once."""
    from qlora_ext.nn import layers_of

    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    *first, last = map(str, sorted({layer.form.bits for _, layer in layers_of(model)}) or [4])
    bits = " and ".join([", ".join(first), last] if first else [last])
    return ModelSize(sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors), f"{bits} bits")
