"""Reads the header of a GGUF file and checks it against the file's size, which the gguf package does not."""

from __future__ import annotations

import dataclasses
import mmap
import os
import pathlib
import re
import struct
from typing import Any

from ..untrusted import FileError, check, excerpt, printable, regular_only

# The names of the embeddings and the output head in a file.
TABLES = ("token_embd.weight", "output.weight")

# llama.cpp's architectures, by transformers' ``model_type``: those for which files are written.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "gpt_oss": "gpt-oss",
}
# In the metadata of files that qlora_ext wrote, after the architecture.
VERSION_KEY = "qlora_ext.version"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor's data in the file.

    Attributes:
        name: in the file.
        shape: as in torch, that is, the last dimension is contiguous.
        kind: GGML's number of the tensor's type.
        begin, nbytes: offset and size of the data in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int

    @property
    def type_name(self) -> str:
        """GGML's name of the tensor's type, such as Q4_K."""
        import gguf

        name: str = gguf.GGMLQuantizationType(self.kind).name
        return name


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a GGUF file: llama.cpp's name of the architecture, and the tensors.

    Attributes:
        is_adapter: whether the file is an adapter, not a model.
    """

    architecture: str
    tensors: list[TensorInfo]
    is_adapter: bool = False


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the metadata, whose values are not read."""

    count: int

    def __repr__(self) -> str:
        return f"an array of {self.count} values"


class _Reader:
    """Reads the little-endian header sequentially, with bounds checks."""

    def __init__(self, data: mmap.mmap, source: str) -> None:
        self.data, self.source, self.at = data, source, 0

    def skip(self, size: int) -> int:
        """Skips ``size`` bytes, and returns the position of the first."""
        begin = self.at
        if size > len(self.data) - begin:
            raise FileError(f"{self.source}: truncated or damaged: {size} bytes at byte {begin} are beyond the end")
        self.at = begin + size
        return begin

    def scalar(self, code: str) -> Any:
        kind = struct.Struct("<" + code)
        return kind.unpack_from(self.data, self.skip(kind.size))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        begin = self.skip(size)
        return self.data[begin : begin + size].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value of the metadata."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise FileError(f"{self.source}: damaged: unknown metadata type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):  # a wrong count ends at the end of the file, because each string takes 8 bytes
                self.skip(self.scalar("Q"))
        else:
            raise FileError(f"{self.source}: damaged: unsupported array of type {kind} in the metadata")
        return _Array(count)


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string()
        if key in found:
            raise FileError(f"{reader.source}: damaged: {excerpt(key)} appears twice in the metadata")
        found[key] = reader.value(reader.scalar("I"))
    return found


def _tensors(reader: _Reader, count: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors, with ``begin`` relative to the data. They must be consecutive, in the order of the header."""
    import gguf

    found: dict[str, TensorInfo] = {}
    end = 0
    for _ in range(count):
        name = reader.string()
        dimensions = reader.scalar("I")
        if name in found or dimensions > _MAX_DIMENSIONS:
            raise FileError(
                f"{reader.source}: damaged: tensor {excerpt(name)} appears twice, or has {dimensions} dimensions"
            )
        shape = [reader.scalar("Q") for _ in range(dimensions)]
        kind, offset = reader.scalar("I"), reader.scalar("Q")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise FileError(f"{reader.source}: tensor {excerpt(name)} has the unknown type {kind}") from None
        elements = 1
        for n in shape:
            elements *= n
        start = -(-end // alignment) * alignment
        if offset != start or not elements or (shape[0] if shape else 1) % block:
            raise FileError(
                f"{reader.source}: damaged: tensor {excerpt(name)} of shape {shape} at byte {offset} of the data, "
                f"expected at byte {start}"
            )
        found[name] = TensorInfo(name, tuple(reversed(shape)), kind, start, elements // block * size)
        end = start + found[name].nbytes
    return found


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a GGUF file.

    Args:
        path: of the file.

    Raises:
        FileError: the file is truncated, or its header does not match its size or its layers. It is a ValueError.

    Example:
        >>> try:
        ...     qlora_ext.gguf.read_header("model.gguf")
        ... except ValueError as error:
        ...     print(error)
        cannot read model.gguf: [Errno 2] No such file or directory: 'model.gguf'
    """
    path = pathlib.Path(path)
    source = printable(path)
    try:
        with (
            open(path, "rb", opener=regular_only) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _read(_Reader(data, source), len(data))
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot read {source}: {error}") from error  # mmap raises a ValueError for an empty file


def _typed(reader: _Reader, metadata: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """The value of a key, or ``default`` if the metadata lack it."""
    value = metadata.get(key, default)
    if value is not None:
        check(value, kind, f"{reader.source}: damaged", excerpt(key))
    return value


def _read(reader: _Reader, size: int) -> Header:
    source = reader.source
    if reader.data[reader.skip(4) : 4] != b"GGUF":
        raise FileError(f"{source}: not a GGUF file, or damaged")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise FileError(f"{source}: expected a little-endian GGUF file of version 2 or 3, got version {version}")
    tensors, values = reader.scalar("Q"), reader.scalar("Q")
    metadata = _metadata(reader, values)
    architecture = _typed(reader, metadata, "general.architecture", str)
    layers = _typed(reader, metadata, f"{architecture}.block_count", int)
    alignment = _typed(reader, metadata, "general.alignment", int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise FileError(f"{source}: damaged: general.alignment is {excerpt(alignment)}, expected a power of two")
    found = _tensors(reader, tensors, alignment)
    end = max((tensor.begin + tensor.nbytes for tensor in found.values()), default=0)
    data = -(-reader.at // alignment) * alignment
    if not data + end <= size <= data + -(-end // alignment) * alignment:
        raise FileError(
            f"{source}: truncated or damaged: its {tensors} tensors end at byte {data + end}, the file at byte {size}"
        )
    beyond = [name for name in found if (match := re.match(r"blk\.(\d+)\.", name)) and int(match[1]) >= (layers or 0)]
    if layers is not None and beyond:
        raise FileError(
            f"{source}: damaged: its metadata has {layers} layers, but {len(beyond)} of its {tensors} tensors belong "
            f"to other layers, such as {excerpt(min(beyond))}"
        )
    placed = [dataclasses.replace(tensor, begin=data + tensor.begin) for tensor in found.values()]
    return Header(str(architecture), placed, metadata.get("general.type") == "adapter")
