"""Tensors that are computed when they are written, so that ``save_pretrained`` never has the model in memory twice.

transformers collects all tensors of a model before it writes the first one. A deferred tensor has their dtype, shape
and size, but its memory is never touched, so that it takes none. It may be renamed and passed on. Whoever computes with
it, other than the function that writes files, gets undefined values.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...atomic import staged_file
from ...digest import bytes_of

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SOURCE = "_qlora_ext_deferred"  # the attribute of a deferred tensor


def dtype_of(name: str) -> torch.dtype | None:
    """The torch dtype of a dtype in a safetensors header; None if it is unknown."""
    return _DTYPES.get(name)


def deferred(
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], compute: Callable[[], Iterable[tuple[str, Tensor]]]
) -> dict[str, Tensor]:
    """Deferred tensors of these dtypes and shapes.

    Args:
        compute: yields each of them, with its name in ``specs``, when they are written.
    """
    tensors = {name: torch.empty(tuple(shape), dtype=dtype, device="cpu") for name, (dtype, shape) in specs.items()}
    for name, t in tensors.items():
        setattr(t, _SOURCE, (compute, name))
    return tensors


def _computed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All tensors, each deferred one computed, at most one weight's at a time."""
    pending: dict[Any, dict[str, str]] = {}
    for name, t in tensors.items():
        source = getattr(t, _SOURCE, None)
        if source is None:
            yield name, t
        else:
            compute, own_name = source
            pending.setdefault(compute, {})[own_name] = name
    for compute, names in pending.items():
        yield from ((names[own_name], t) for own_name, t in compute() if own_name in names)


def has_deferred(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of the tensors is deferred."""
    return any(hasattr(t, _SOURCE) for t in tensors.values())


def write_file(tensors: Mapping[str, Tensor], path: pathlib.Path, metadata: Mapping[str, str] | None) -> None:
    """Writes a safetensors file, in which each deferred tensor is computed.

    Raises:
        ValueError: safetensors has no such dtype. OSError: the file cannot be written.
    """
    # Readers view the file's bytes in the tensor's dtype, so tensors with larger elements come first.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {} if not metadata else {"__metadata__": dict(metadata)}
    size = 0
    for name in names:
        t = tensors[name]
        if t.dtype not in _NAMES:
            raise ValueError(f"{name}: expected a dtype that safetensors files have, got {t.dtype}")
        header[name] = {"dtype": _NAMES[t.dtype], "shape": [*t.shape], "data_offsets": [size, size + t.nbytes]}
        size += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with staged_file(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for name, t in _computed(tensors):
            expected = tensors[name]
            assert (t.dtype, t.shape) == (expected.dtype, expected.shape), name
            file.seek(begin + header[name]["data_offsets"][0])
            file.write(bytes_of(t))
