"""Reads the weights of a GGUF file one at a time, so that the model is never in memory twice.

transformers decodes a whole GGUF file, and quantizes nothing. Here, weights of the types in ``blocks.KINDS`` stay as
they are stored, even if their rows have to be moved.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..untrusted import FileError, excerpt, printable
from ..weight import Weight4bit
from . import blocks
from .file import TensorInfo, read_header
from .names import Names
from .rows import Rows

if TYPE_CHECKING:
    from ..form import Form
    from ..integrations.transformers import QLoRAConfig
    from .gguf_source import GGUFSource

_log = logging.getLogger(__name__)
_CHUNK = 1 << 18  # elements that are read at a time
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor of the file that a weight comes from; ``rows`` is None if transformers computes the weight from it."""

    tensor: TensorInfo
    rows: Rows | None

    @property
    def count(self) -> int:
        """The number of rows of the tensor."""
        return math.prod(self.tensor.shape[:-1])


class _Weight:
    """A weight that is read on access with ``[...]``, the way transformers reads slices of safetensors files."""

    def __init__(self, file: GGUFWeights, name: str, kept: set[str]) -> None:
        self._file, self._name, self._kept = file, name, kept

    def __getitem__(self, index: Any) -> _Weight | Tensor:
        return self if index is Ellipsis else self._file.decode(self._name)[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor | Weight4bit:
        """The weight: packed for a layer that keeps the file's bits, otherwise decoded."""
        dtype, device = dtype or torch.float32, "cpu" if device is None else device
        if self._name in self._kept:
            return self._file.stored(self._name).to(device).replace(dtype=dtype)
        return self._file.decode(self._name, dtype).to(device)


class _Rows:
    """A weight that is filled with a few of its rows at a time, so that none of its memory is needed twice."""

    def __init__(self, count: int) -> None:
        self._count, self._tensors = count, dict[str, Tensor]()
        self._first: Weight4bit | None = None

    def put(self, numbers: slice | Tensor, rows: Weight4bit) -> None:
        """Stores the matrix ``rows`` as the rows ``numbers``."""
        self._first = rows if self._first is None else self._first
        for name, t in rows.tensors.items():
            if name == "scale_table":
                continue
            part = t.reshape(rows.shape[0], -1)
            if name not in self._tensors:
                self._tensors[name] = torch.empty((self._count, part.shape[1]), dtype=t.dtype, device=t.device)
            self._tensors[name][numbers] = part

    def weight(self, shape: tuple[int, ...]) -> Weight4bit:
        """The matrix or stack of matrices of that shape, when all rows are stored."""
        assert self._first is not None
        *stack, rows, _ = shape
        fields: dict[str, Any] = {name: t.view(*stack, -1) for name, t in self._tensors.items()}
        fields["packed"] = self._tensors["packed"].view(*stack, rows, -1)
        if (table := self._first.scale_table) is not None:
            fields["scale_table"] = table.expand(*stack, -1).clone()
        return self._first.replace(**fields, shape=torch.Size(shape))


class GGUFWeights:
    """The weights of a GGUF file, by their names in a transformers model.

    Args:
        path: of a file that transformers can read.
        model: a transformers model with the file's configuration; it may be on the meta device.

    Attributes:
        unknown: the names of tensors in the file for which the model has no weight.
        summary: what ``load`` made of the tensors of each type.

    Raises:
        NotImplementedError: the architecture's tensor names are unknown.
        FileError: the file is truncated or damaged, or the gguf package cannot decode one of its types. It is a
            ValueError.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> def load(directory, file):
        ...     config = AutoConfig.from_pretrained(directory, gguf_file=file)
        ...     with torch.device("meta"):
        ...         model = AutoModelForCausalLM.from_config(config)
        ...     weights = qlora_ext.gguf.GGUFWeights(f"{directory}/{file}", model)
        ...     return weights.load(quantization_config=qlora_ext.QLoRAConfig(), dtype=torch.bfloat16)
    """

    def __init__(self, path: str | os.PathLike[str], model: Any) -> None:
        path = pathlib.Path(path)
        self._path, self._model = path, model
        header = read_header(path)
        self._names = Names(header.architecture, model)
        # NVFP4 tensors may have one more scale, or one per expert.
        named = {tensor.name: tensor for tensor in header.tensors}
        self._scales = {
            tensor.name: named[scale]
            for tensor in header.tensors
            if tensor.type_name == "NVFP4" and (scale := tensor.name.removesuffix("weight") + "scale") in named
        }
        self._parts: dict[str, list[_Part]] = {}  # a many-to-many relation
        self.unknown: list[str] = []
        self.summary = ""
        for tensor in header.tensors:
            found = self._names.places_of(tensor.name, tensor.shape)
            for name, rows in found.items():
                self._parts.setdefault(name, []).append(_Part(tensor, rows))
            if not found and tensor not in self._scales.values():
                self.unknown.append(tensor.name)

    def load(self, **options: Any) -> Any:
        """Calls ``from_pretrained`` with these weights and ``options``, and returns its result.

        With a ``QLoRAConfig``, layers, embeddings and output heads keep the bits of weights that the file stores in a
        type of ``blocks.KINDS``, and others are dense. With ``skip_modules``, the modules that it names are dense, and
        other layers are quantized to NF4; with ``embeddings``, other embeddings are, too. If the file has no such
        weight for a layer, or with ``requantize``, the layers are quantized like those of any dense model. Unless the
        configuration asks for it, they must then be stored as floating-point numbers.

        Raises:
            ValueError: the file lacks the weight of a layer, or has it in a type that is not supported.
        """
        from ..integrations.transformers import QLoRAConfig

        self.check_complete()
        if options.get("dtype", "auto") == "auto":  # transformers would search it in the tensors
            options["dtype"] = self._model.dtype
        config, source = options.get("quantization_config"), None
        if isinstance(config, QLoRAConfig):
            options["quantization_config"] = config = copy.copy(config)
            config._source = source = self._source(config)
        weights = self.values(set()) if source is None else source.values()
        loaded = type(self._model).from_pretrained(None, config=self._model.config, state_dict=weights, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config._name_or_path = str(
            self._path.parent
        )  # as from_pretrained sets it for a GGUF file
        if source is None:
            self.summarize(model, set())
        return loaded

    def check_complete(self) -> None:
        """Raises a ValueError if the file lacks the weight of a layer."""
        from ..integrations.transformers.modules import check_complete

        check_complete(self._model, self._parts, self.unknown, [str(self._path)])

    def values(self, kept: set[str]) -> dict[str, _Weight]:
        """All weights, to be passed to transformers, which reads one at a time; those in ``kept`` stay packed."""
        return {name: _Weight(self, name, kept) for name in self._parts}

    def forms(self, requantize: bool = False) -> dict[str, Form]:
        """The forms of the packed weights with ``QLoRAConfig()``, by name; empty if none of them stays as stored.

        Args:
            requantize: as in ``QLoRAConfig``.
        """
        from ..integrations.transformers import QLoRAConfig

        config = QLoRAConfig(requantize=requantize)
        source = self._source(config)
        found = source.forms(self._model)
        return found | dict.fromkeys(source.quantized, config.form) if found else {}

    def _source(self, config: QLoRAConfig) -> GGUFSource:
        from .gguf_source import GGUFSource

        source = GGUFSource(config, lambda files, model: self)
        source.forms(self._model)
        return source

    def decode(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``name`` of the model, rounded once to ``dtype``.

        Raises:
            FileError: the file cannot be read, or lacks a part of the weight.
        """
        parts, layout = self._parts[name], self._layout(name)
        if layout is None:
            found: dict[str, Tensor] = {}
            for part in parts:
                values = self._values(part, 0, self._read(part, 0, part.count)).reshape(part.tensor.shape)
                found = self._names.process(part.tensor.name, values, found)
            expected, count = found[name].numel(), sum(math.prod(part.tensor.shape) for part in parts)
            if count != expected:
                raise self._incomplete(name, f"{expected} values", count)
            return found[name].to(dtype)
        width = parts[0].tensor.shape[-1]
        out = torch.empty((math.prod(layout.stack), width), dtype=dtype, device="cpu")
        for part in parts:
            for begin, where, data in self._chunks(part):
                out[where] = torch.from_numpy(self._values(part, begin, data)).to(dtype)
        out = out.view(*layout.stack, width)
        return out.transpose(-1, -2).contiguous() if layout.transposed else out

    def stored(self, name: str) -> Weight4bit:
        """The weight ``name`` of the model as the file stores it, with its rows in the model's order.

        A weight that the model stores transposed has the file's shape.

        Raises:
            ValueError: its type is none of ``blocks.KINDS``, or transformers changes its values. FileError: the file
                cannot be read, is damaged, or lacks a part of the weight.
        """
        kind, parts = self.stored_kind(name), self._parts[name]
        if kind is None:
            raise ValueError(f"{name}: expected a weight stored in one of the types {', '.join(blocks.KINDS)}")
        layout = self._layout(name)
        assert layout is not None
        width = parts[0].tensor.shape[-1]
        found = _Rows(math.prod(layout.stack))
        for part in parts:
            where = self._where(part.tensor)
            for begin, numbers, data in self._chunks(part):
                rows = blocks.read(kind, data, (len(data), width), where, begin)
                found.put(numbers, rows)
        w4 = found.weight((*layout.stack, width))
        factors = self._factors(parts[0])
        if factors is None or w4.scale_table is None:
            return w4
        table = w4.scale_table * torch.from_numpy(factors).view(-1, 1)
        return w4.replace(scale_table=table.view(w4.scale_table.shape))

    def stored_kind(
        self, name: str, shape: tuple[int, ...] | None = None, transposed: bool | None = None
    ) -> str | None:
        """The type of the weight ``name`` if ``stored`` returns it, else None.

        Args:
            shape, transposed: also None if ``stored`` does not have that shape, or if the model's weight is not its
                transpose, or is.
        """
        if name not in self._parts or (layout := self._layout(name)) is None:
            return None
        parts = self._parts[name]
        kinds = {part.tensor.type_name for part in parts}
        if len(parts) > 1 and any(part.tensor.name in self._scales for part in parts):
            return None  # its rows have different factors
        fits = shape in (None, (*layout.stack, parts[0].tensor.shape[-1])) and transposed in (None, layout.transposed)
        return kinds.pop() if fits and len(kinds) == 1 and kinds <= {*blocks.KINDS} else None

    def check_requantized(self, names: Iterable[str]) -> None:
        """Rejects weights ``names`` that would be quantized a second time, to NF4.

        Raises:
            FileError: a weight is neither of a type in ``blocks.KINDS`` nor stored as floating-point numbers.
        """
        for part in (part for name in names for part in self._parts.get(name, ())):
            if (kind := part.tensor.type_name) not in (*_FLOATS, *blocks.KINDS):
                raise FileError(
                    f"{self._where(part.tensor)}: expected one of {', '.join((*blocks.KINDS, *_FLOATS))}, got {kind}, "
                    "which NF4 would quantize a second time; take a file of the model in another type, or name the "
                    "layers that stay dense in skip_modules to quantize the others all the same"
                )

    def summarize(self, model: Any, kept: set[str]) -> None:
        """Sets and logs ``summary``: what became of the tensors of each type, with the memory of those decoded."""
        from ..nn import Packed4bit

        counts, nbytes = collections.Counter[tuple[str, str]](), collections.Counter[tuple[str, str]]()
        for name, parts in self._parts.items():
            module, _, weight = name.rpartition(".")
            layer = model.get_submodule(module)
            is_packed = isinstance(layer, Packed4bit) and weight in layer.packed_shapes
            for part in parts:
                kind = part.tensor.type_name
                if is_packed:
                    fate = "as stored" if name in kept else f"quantized to {layer.forms[weight].code.upper()}"
                else:
                    fate = "dense" if kind in _FLOATS else "decoded"
                counts[kind, fate] += 1
                nbytes[kind, fate] += getattr(layer, weight).element_size() * math.prod(part.tensor.shape)
        memory = model.get_memory_footprint()

        def share(kind: str, fate: str) -> str:
            return f" ({nbytes[kind, fate] / memory:.1%} of the memory)" if fate == "decoded" else ""

        found = ", ".join(f"{count} {kind} {fate}{share(kind, fate)}" for (kind, fate), count in counts.most_common())
        self.summary = f"{printable(self._path.name)}: {found}"
        _log.info(self.summary)

    def _layout(self, name: str) -> Rows | None:
        """How rows of the file make up the weight ``name``; None if transformers computes it.

        Raises:
            FileError: the file lacks some of the rows.
        """
        parts = self._parts[name]
        rows = [part.rows for part in parts if part.rows is not None]
        alike = {(r.stack, r.transposed, part.tensor.shape[-1]) for r, part in zip(rows, parts, strict=False)}
        if len(rows) < len(parts) or len(alike) > 1:
            return None
        expected, found = math.prod(rows[0].stack), sum(part.count for part in parts)
        if found != expected:
            raise self._incomplete(name, f"{expected} rows", found)
        return rows[0]

    def _incomplete(self, name: str, expected: str, found: int) -> FileError:
        where = self._where(self._parts[name][0].tensor)
        return FileError(f"{where}: incomplete: expected {expected} for {excerpt(name)}, got {found}")

    def _where(self, tensor: TensorInfo) -> str:
        return f"{printable(self._path)}: {excerpt(tensor.name)}"

    def _chunks(self, part: _Part) -> Iterator[tuple[int, slice | Tensor, Any]]:
        """A few rows at a time: the number of the first, where they are in the weight, and their bytes."""
        assert part.rows is not None
        step = max(1, _CHUNK // part.tensor.shape[-1])
        for begin in range(0, part.count, step):
            end = min(begin + step, part.count)
            yield begin, part.rows.of(begin, end), self._read(part, begin, end)

    def _read(self, part: _Part, begin: int, end: int) -> Any:
        """The bytes of rows ``begin`` to ``end - 1`` of a tensor [rows, bytes per row]."""
        tensor, size = part.tensor, part.tensor.nbytes // part.count
        try:
            data = np.fromfile(self._path, np.uint8, (end - begin) * size, offset=tensor.begin + begin * size)
        except OSError as error:
            raise FileError(f"cannot read {printable(self._path)}: {error.strerror}") from error
        if data.size != (end - begin) * size:
            raise FileError(f"{self._where(tensor)}: truncated while it was read")
        return data.reshape(end - begin, size)

    def _values(self, part: _Part, begin: int, data: Any) -> Any:
        """The float32 values of rows from ``begin`` on, which have these bytes."""
        import gguf

        try:
            values = gguf.dequantize(data, gguf.GGMLQuantizationType(part.tensor.kind))
        except NotImplementedError as error:
            raise FileError(
                f"{self._where(part.tensor)}: the gguf package cannot decode {part.tensor.type_name}"
            ) from error
        factors = self._factors(part)
        if factors is None:
            return values
        rows = np.arange(begin, begin + len(values)) // (part.count // len(factors))
        return values * factors[rows, None]

    def _factors(self, part: _Part) -> Any:
        """The factors of an NVFP4 tensor, float32 [matrices]; None if it has none."""
        if part.tensor.name not in self._scales:
            return None
        scale = _Part(self._scales[part.tensor.name], None)
        factors = self._values(scale, 0, self._read(scale, 0, scale.count)).reshape(-1)
        count = math.prod(part.tensor.shape[:-2])
        if len(factors) != count or not np.isfinite(factors).all():
            raise FileError(f"{self._where(scale.tensor)}: expected {count} finite factors, got {excerpt(factors)}")
        return factors


def source_of(config: QLoRAConfig) -> GGUFSource:
    """The source of the file that transformers opens for a model with ``config``."""
    from .gguf_source import GGUFSource

    def opened(files: Sequence[str], model: Any) -> GGUFWeights:
        weights = GGUFWeights(files[0], model)
        weights.check_complete()
        return weights

    return GGUFSource(config, opened)
