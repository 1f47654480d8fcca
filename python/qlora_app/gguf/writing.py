"""Writes the tensors of a GGUF file one at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from qlora_ext.gguf import blocks
from qlora_ext.weight import Weight4bit

# The types to which a dense weight is converted.
DENSE_KINDS = ("F32", "F16", "BF16", "Q8_0")
# All types of which a weight can be written.
KINDS = (*DENSE_KINDS, "Q4_0", "Q4_1", "IQ4_NL", "MXFP4")


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Attributes:
        name, shape: in the file.
        kind: the name of its type.
        nbytes: its size in the file.
        data: returns its bytes. It is called once, when the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    data: Callable[[], Any]


def bytes_per_row(kind: str, width: int) -> int | None:
    """The size of a row in a type; None if rows of that width do not consist of whole blocks."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return None if width % elements else width // elements * size


def nbytes_of(kind: str, shape: Sequence[int]) -> int:
    """The size of a tensor in a type.

    Raises:
        ValueError: its rows do not consist of whole blocks.
    """
    *rows, width = shape
    size = bytes_per_row(kind, width)
    if size is None:
        raise ValueError(f"rows of {width} weights, no multiple of a block")
    return math.prod(rows) * size


def packed(kind: str, w4: Weight4bit) -> Any:
    """The bytes of a 4-bit weight as a tensor of the type ``kind``, one of ``blocks.KINDS``."""
    return np.frombuffer(blocks.write(kind, w4), np.uint8)


def converted(kind: str, w: Tensor) -> Any:
    """The bytes of a float32 weight as a tensor of the type ``kind``, one of ``DENSE_KINDS``.

    Raises:
        ValueError: a value is too large for the type.
    """
    values = w.contiguous().numpy()
    with np.errstate(over="ignore"):
        data = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(data).all():
        raise ValueError("a value is too large for float16")
    return data.view(np.uint8).reshape(-1)


def write_tensors(writer: gguf.GGUFWriter, tensors: Sequence[NewTensor]) -> None:
    """Writes the metadata that ``writer`` has, and then the tensors, and closes the file."""
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data())
    writer.close()
