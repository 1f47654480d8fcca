"""The targets ``gguf:...``. Of a base that is a GGUF file, the result is that file with other weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch

from qlora_ext.calibration import Calibration
from qlora_ext.gguf import GGUFWeights, blocks
from qlora_ext.gguf.file import ARCHITECTURES, TABLES, TensorInfo, read_header
from qlora_ext.integrations.peft.base_file import recorded_requantized
from qlora_ext.nn import layers_of, quantize_model
from qlora_ext.weight import quantize

from ..errors import UserError, first_line
from ..gguf.layout import FileTensor, file_tensors
from ..gguf.writing import DENSE_KINDS, NewTensor, converted, nbytes_of, packed, rewrite
from ..models import validate_model
from ..models.adapted import Adapted
from ..models.adapter_files import base_of, find
from ..models.loading import stored_layers
from ..models.pretrained import has_4bit_blocks, load_config
from ..models.sources import ModelSource, resolve
from . import gguf_conversion
from .job import Job
from .lora import adapted_layers, architecture_of, check_plain, check_tied
from .model_directories import find_model
from .targets import TARGETS, ExportRequest
from .trained_for import trained_for
from .weights import Encoder, MergedWeights, report

_MORE_METADATA = 1 << 16  # bytes
# The target's type that leaves each tensor its own.
_SAME = "SAME"
# Tensors that llama.cpp reads in float32.
_FLOAT32 = ("ffn_gate_inp.weight", "_norm.weight")


def default_kind(request: ExportRequest) -> str:
    """The type of a target that names none: that of merge-aware training, those of the base's file, or Q8_0."""
    adapter = None if request.adapter is None else find(request.adapter)
    if f"gguf:{(kind := trained_for(adapter))}" in TARGETS:
        return str(kind)
    if adapter is not None:
        source = base_of(adapter, request.model, request.trust_remote_code)
    else:
        source = resolve(request.model or "", request.trust_remote_code)
    if not has_4bit_blocks(source) or (adapter is not None and recorded_requantized(adapter)):
        return "q8_0"
    return "same" if all(map(_can_be_written, read_header(_file_of(source)).tensors)) else "q8_0"


def _can_be_written(tensor: TensorInfo) -> bool:
    """Whether a changed tensor can keep its type. Other tensors of NVFP4 have factors of its scales."""
    return tensor.type_name != "NVFP4" and tensor.type_name in (*blocks.KINDS, *DENSE_KINDS)


def prepare(request: ExportRequest) -> Job:
    """A file in which the weights have the type of the target, or of a GGUF file those that change."""
    target, kind = f"--to {request.to}", request.kind.upper()
    if request.adapter is None:
        assert request.model is not None
        source = resolve(request.model, request.trust_remote_code)
        if source.gguf_file is not None:
            return _retype(target, source, kind, request.embeddings)
    adapted, skeleton = find_model(request)
    if adapted.source.gguf_file is None:
        if kind == _SAME:
            raise UserError(
                f"{target}: expected a base that is a GGUF file, whose types it keeps, got {adapted.source.name}; "
                "name a type, as in gguf:q8_0"
            )
        return gguf_conversion.prepare(request, kind, adapted, skeleton)
    return _merge(target, adapted, skeleton, kind, request.embeddings)


@dataclasses.dataclass(frozen=True)
class _Merge:
    """A checked export: the tensors that change.

    Attributes:
        target: the option and its value, for error messages.
        kind: the type that the target names.
        tensors: those that hold the weights that change.
        kinds: the types of all tensors that change, by name.
        dropped: the names of tensors that the result does not have.
    """

    target: str
    adapted: Adapted
    kind: str
    file: pathlib.Path
    tensors: list[FileTensor]
    kinds: dict[str, str]
    dropped: set[str]


def _file_of(source: ModelSource) -> pathlib.Path:
    assert source.gguf_file is not None
    return pathlib.Path(source.path) / source.gguf_file


def _merge(target: str, adapted: Adapted, skeleton: Any, kind: str, embeddings: str | None) -> Job:
    """The base's file with the adapter in its weights."""
    source = adapted.source
    assert adapted.adapter is not None
    check_plain(target, adapted.adapter)
    check_tied(target, adapted.adapter, skeleton)
    architecture = architecture_of(target, source, load_config(source))
    changed, file = _changed(target, adapted), _file_of(source)
    in_file = {tensor.name: tensor for tensor in read_header(file).tensors}
    try:
        tensors = file_tensors(architecture, skeleton, changed)
    except ValueError as error:
        raise UserError(f"{target}: {first_line(error)}; use --to dense") from error
    for tensor in tensors:
        shape = in_file[tensor.name].shape if tensor.name in in_file else None
        if shape != tensor.shape or not tensor.is_matrix:
            raise UserError(
                f"{target}: {tensor.weight}: expected a tensor {tensor.name} of shape {list(tensor.shape)} in "
                f"{source.name}, got {'none' if shape is None else list(shape)}; use --to dense"
            )
    kinds = {tensor.name: _kind_of(target, tensor, in_file[tensor.name], kind, embeddings) for tensor in tensors}
    # The values of NVFP4 weights contain the factors that the file has beside them.
    factors = {f"{name.removesuffix('weight')}scale" for name in kinds if in_file[name].type_name == "NVFP4"}
    kinds = _embeddings(file, embeddings) | kinds
    merge = _Merge(target, adapted, kind, file, tensors, kinds, factors & in_file.keys())
    calibrates = adapted if gguf_conversion.is_calibrated(kind) else None
    return Job(_size(target, file, kinds), functools.partial(_build, merge), calibrates=calibrates)


def _kind_of(target: str, tensor: FileTensor, stored: TensorInfo, kind: str, embeddings: str | None) -> str:
    """The type that a tensor gets that the adapter changes."""
    if kind != _SAME or (embeddings is not None and tensor.name in TABLES):
        return gguf_conversion.kind_of(tensor, kind, gguf_conversion.embeddings_kind(embeddings, kind))
    if not _can_be_written(stored):
        raise UserError(
            f"{target}: {tensor.name}: expected a type that can be written, got {stored.type_name}; use --to gguf:q8_0"
        )
    return stored.type_name


def _changed(target: str, adapted: Adapted) -> list[str]:
    """The names of the weights that the adapter changes, and of those that training encoded otherwise than the file."""
    source, adapter = adapted.source, adapted.adapter
    assert adapter is not None
    config = load_config(source)
    with torch.device("meta"):
        quantized = quantize_model(validate_model.skeleton(source, config))
    layers = dict(layers_of(quantized))
    stored, encoded = stored_layers(source, config, adapted.loader.requantize), []
    if stored is None or trained_for(adapter) is not None:
        names = [f"{name}.{weight}" for name, layer in layers.items() for weight in layer.packed_shapes]
        encoded = [name for name in names if stored is None or name in stored]
    return [*dict.fromkeys([*adapted_layers(target, adapter, quantized), *encoded])]


def _embeddings(file: pathlib.Path, kind: str | None) -> dict[str, str]:
    """The types of the embeddings and the output head of a file, if they have to change."""
    if kind is None:
        return {}
    tensors = [tensor for tensor in read_header(file).tensors if tensor.name in TABLES]
    return {tensor.name: kind.upper() for tensor in tensors if tensor.type_name != kind.upper()}


def _size(target: str, file: pathlib.Path, kinds: dict[str, str]) -> int:
    """The size of the file if its tensors have these types."""
    nbytes = file.stat().st_size + _MORE_METADATA
    for tensor in read_header(file).tensors:
        try:
            nbytes += nbytes_of(kinds.get(tensor.name, tensor.type_name), tensor.shape) - tensor.nbytes
        except ValueError as error:
            raise UserError(f"{target}: {tensor.name} has {error}; use --to gguf:f16") from error
    return nbytes


def _build(merge: _Merge, calibration: Calibration | None) -> Callable[[pathlib.Path], None]:
    kinds = [(tensor, merge.kinds[tensor.name]) for tensor in merge.tensors]
    encoded = gguf_conversion.calibrated(merge.adapted, merge.kind, kinds, calibration)
    model = merge.adapted.load_to_merge()
    source = merge.adapted.source
    in_file = GGUFWeights(merge.file, validate_model.skeleton(source, load_config(source)))
    return functools.partial(_write, merge, MergedWeights(model, encoded, in_file.decode))


def _write(merge: _Merge, weights: MergedWeights, path: pathlib.Path) -> None:
    in_file = {tensor.name: tensor for tensor in read_header(merge.file).tensors}
    encoders = {kind: Encoder(blocks.form_of(kind)) for kind in merge.kinds.values() if kind in blocks.KINDS}
    replaced = {name: _retyped(merge.target, merge.file, in_file[name], kind) for name, kind in merge.kinds.items()}
    for tensor in merge.tensors:
        new = replaced[tensor.name]
        data = functools.partial(gguf_conversion.data, merge.target, weights, tensor, new.kind, encoders.get(new.kind))
        replaced[tensor.name] = dataclasses.replace(new, data=data)
    rewrite(merge.file, path, replaced, merge.dropped)
    report(encoders.values())


def _retype(target: str, source: ModelSource, kind: str, embeddings: str | None) -> Job:
    """The file with all its matrices in the type ``kind``, or in their own."""
    file = _file_of(source)
    header = read_header(file)
    if header.architecture not in ARCHITECTURES.values():
        raise UserError(
            f"{target}: {source.name} is a {header.architecture} model, expected one of "
            f"{', '.join(dict.fromkeys(ARCHITECTURES.values()))}; use llama-quantize of llama.cpp"
        )
    kinds = {}
    for tensor in header.tensors:
        if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or tensor.name.endswith(_FLOAT32):
            continue
        is_table = tensor.name in TABLES
        if kind == _SAME and (embeddings is None or not is_table):
            continue
        if tensor.type_name == "NVFP4":  # other tensors have factors of its scales
            raise UserError(f"{target}: {tensor.name} of {source.name} is in NVFP4; use --to dense")
        new = gguf_conversion.embeddings_kind(embeddings, kind) if is_table else kind
        if new != tensor.type_name:
            kinds[tensor.name] = new

    def write(path: pathlib.Path) -> None:
        in_file = {tensor.name: tensor for tensor in header.tensors}
        rewrite(file, path, {name: _retyped(target, file, in_file[name], kind) for name, kind in kinds.items()})

    return Job(_size(target, file, kinds), lambda _: write)


def _retyped(target: str, file: pathlib.Path, tensor: TensorInfo, kind: str) -> NewTensor:
    """A tensor of a file in another type."""

    def data() -> Any:
        rows = math.prod(tensor.shape[:-1])
        stored = np.memmap(file, np.uint8, "r", tensor.begin, (tensor.nbytes,)).reshape(rows, -1)
        try:
            w = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[tensor.type_name]))
            return converted(kind, w) if kind in DENSE_KINDS else packed(kind, quantize(w, blocks.form_of(kind)))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{target}: {tensor.name}: {first_line(error)}; use --to gguf:bf16") from error

    return NewTensor(tensor.name, tensor.shape, kind, nbytes_of(kind, tensor.shape), data)
