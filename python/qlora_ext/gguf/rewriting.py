"""Copies a GGUF file with some tensors replaced. Its metadata, with the tokenizer, and other tensors do not change."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .._internal.version import VERSION
from ..weight import Weight4bit
from . import blocks
from .file import VERSION_KEY, read_header

# The types to which a dense weight is converted.
DENSE_KINDS = ("F16", "BF16", "Q8_0")


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A matrix [N, K] of the new file.

    Attributes:
        kind: the name of its type.
        data: its bytes, uint8 [N, bytes per row].
    """

    kind: str
    data: Any


def packed(kind: str, w4: Weight4bit) -> Replacement:
    """A 4-bit weight as a tensor of the type ``kind``, one of ``blocks.KINDS``."""
    data = np.frombuffer(blocks.write(kind, w4), np.uint8)
    return Replacement(kind, data.reshape(w4.shape[0], -1))


def converted(kind: str, w: Tensor) -> Replacement:
    """A float32 weight as a tensor of the type ``kind``, one of ``DENSE_KINDS``."""
    import gguf

    data = gguf.quantize(w.contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    return Replacement(kind, data.view(np.uint8).reshape(len(w), -1))


def bytes_per_row(kind: str, width: int) -> int | None:
    """The size of a row in a type; None if rows of that width do not consist of whole blocks."""
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return None if width % elements else width // elements * size


def rewrite(source: str | os.PathLike[str], path: str | os.PathLike[str], replaced: Mapping[str, Replacement]) -> None:
    """Writes the file ``path``: ``source`` with the tensors ``replaced``.

    Raises:
        FileError: ``source`` is damaged.
    """
    import gguf

    header = read_header(source)
    writer = gguf.GGUFWriter(os.fspath(path), header.architecture)
    writer.add_string(VERSION_KEY, VERSION)
    reader = gguf.GGUFReader(source)
    for name, field in reader.fields.items():
        if name in (gguf.Keys.General.ARCHITECTURE, VERSION_KEY) or name.startswith("GGUF."):
            continue
        if name == gguf.Keys.General.ALIGNMENT:
            writer.add_custom_alignment(field.contents())
        elif field.types[0] != gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, field.contents(), field.types[0])
        elif len(field.types) > 1:  # the gguf package does not write empty arrays
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    data = {}
    for tensor in header.tensors:
        new = replaced.get(tensor.name)
        if new is None:
            data[tensor.name] = np.memmap(source, np.uint8, "r", tensor.begin, (tensor.nbytes,))
            kind, nbytes = gguf.GGMLQuantizationType(tensor.kind), tensor.nbytes
        else:
            data[tensor.name] = new.data
            kind, nbytes = gguf.GGMLQuantizationType[new.kind], new.data.nbytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in data.values():
        writer.write_tensor_data(values)
    writer.close()
