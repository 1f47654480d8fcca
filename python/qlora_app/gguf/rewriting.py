"""Copies a GGUF file with some tensors replaced. Its metadata, with the tokenizer, and other tensors do not change."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping

import gguf
import numpy as np

from qlora_ext.gguf.file import VERSION_KEY, read_header
from qlora_ext.version import VERSION

from .writing import NewTensor, write_tensors


def rewrite(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    replaced: Mapping[str, NewTensor],
    dropped: Collection[str] = (),
) -> None:
    """Writes the file ``path``: ``source`` with the tensors ``replaced``, by name, and without those ``dropped``.

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
