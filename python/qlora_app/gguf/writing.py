"""Writes the tensors of a GGUF file one at a time, and copies of a file with some tensors replaced."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from qlora_ext.gguf import blocks
from qlora_ext.gguf.file import VERSION_KEY, read_header
from qlora_ext.version import VERSION
from qlora_ext.weight import Weight4bit

# The types that a dense weight has.
DENSE_KINDS = ("F32", "F16", "BF16")


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


def nbytes_of(kind: str, shape: Sequence[int]) -> int:
    """The size of a tensor in a type.

    Raises:
        ValueError: its rows do not consist of whole blocks.
    """
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if shape[-1] % elements:
        raise ValueError(f"rows of {shape[-1]} weights, no multiple of a block")
    return math.prod(shape) // int(elements) * int(size)


def packed(kind: str, w4: Weight4bit) -> Any:
    """The bytes of a weight as a tensor of the type ``kind``, one of ``blocks.KINDS``."""
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


def rewrite(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    replaced: Mapping[str, NewTensor],
    dropped: Collection[str] = (),
) -> None:
    """Writes the file ``path``: ``source`` with the tensors ``replaced``, by name, and without those ``dropped``.

    The metadata, with the tokenizer, and other tensors do not change.

    Raises:
        FileError: ``source`` is damaged.
    """
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
    tensors = []
    for tensor in (tensor for tensor in header.tensors if tensor.name not in dropped):
        data = functools.partial(np.memmap, source, np.uint8, "r", tensor.begin, (tensor.nbytes,))
        old = NewTensor(tensor.name, tensor.shape, tensor.type_name, tensor.nbytes, data)
        tensors.append(replaced.get(tensor.name, old))
    write_tensors(writer, tensors)
