"""The targets ``gguf:...``. Of a base that is a GGUF file, the result is that file with other weights."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ...checkpoints import select_rows
from ...form import Form
from ...gguf import GGUFWeights, blocks
from ...gguf.adapter import Place, places
from ...gguf.file import ARCHITECTURES, TensorInfo, read_header
from ...gguf.rewriting import rewrite
from ...gguf.writing import DENSE_KINDS, NewTensor, converted, nbytes_of, packed
from ...merged import seed_of
from ...nn import layers_of, to_be_quantized
from ...weight import quantize
from ..errors import UserError, first_line
from ..models import validate_model
from ..models.adapted import Adapted
from ..models.loading import stored_forms
from ..models.pretrained import load_config
from ..models.sources import ModelSource, resolve
from . import gguf_conversion
from .calibrated import CalibratedWeights
from .job import Job
from .lora import architecture_of, check_plain, check_tied, ranks_of
from .model_directories import find_model
from .trained_for import trained_for
from .weights import Encoder, before_and_after, finished_in, layers_by_name, stored_in

_MORE_METADATA = 1 << 16  # bytes
# Tensors that llama.cpp reads in float32.
_FLOAT32 = ("ffn_gate_inp.weight", "_norm.weight")


def prepare(arguments: argparse.Namespace, kind: str) -> Job:
    """A file in which the weights have the type ``kind``, or of a GGUF file those that change."""
    target = f"--to {arguments.to}"
    if arguments.adapter is None:
        source = resolve(arguments.model, arguments.trust_remote_code)
        if source.gguf_file is not None:
            return _retype(target, source, kind, arguments.embeddings)
    adapted, skeleton = find_model(arguments, unties=True)
    if adapted.source.gguf_file is None:
        return gguf_conversion.prepare(arguments, kind, adapted, skeleton)
    return _merge(target, adapted, skeleton, kind, arguments.embeddings)


@dataclasses.dataclass(frozen=True)
class _Merge:
    """A checked export: the types of the tensors that change, and where the adapted layers are.

    Attributes:
        target: the option and its value, for error messages.
        places: the tensors of the layers whose weights change.
        kinds: the types of all tensors that change, by name.
        calibrated: the weights that ``--calibrate`` has encoded; None if the target has no 4-bit weights.
    """

    target: str
    adapted: Adapted
    file: pathlib.Path
    places: dict[str, Place]
    kinds: dict[str, str]
    calibrated: CalibratedWeights | None

    @functools.cached_property
    def weights(self) -> GGUFWeights:
        """The weights in the file."""
        source = self.adapted.source
        return GGUFWeights(self.file, validate_model.skeleton(source, load_config(source)))


def _file_of(source: ModelSource) -> pathlib.Path:
    assert source.gguf_file is not None
    return pathlib.Path(source.path) / source.gguf_file


def _merge(target: str, adapted: Adapted, skeleton: Any, kind: str, embeddings: str | None) -> Job:
    """The base's file with the adapter in its weights."""
    source = adapted.source
    assert adapted.adapter is not None
    check_plain(target, adapted.adapter)
    check_tied(target, adapted.adapter, skeleton)
    config = load_config(source)
    architecture = architecture_of(target, source, config)
    changed = dict.fromkeys(ranks_of(target, adapted.adapter, skeleton))
    stored = stored_forms(source, config)
    if stored is None or trained_for(adapted.adapter) is not None:  # training has encoded other layers too
        names = to_be_quantized(skeleton).values()
        changed |= dict.fromkeys(name for name in names if stored is None or f"{name}.weight" in stored)
    try:
        found = places(architecture, skeleton, changed)
    except ValueError as error:
        raise UserError(f"{target}: {first_line(error)}; use --to dense") from error
    file = _file_of(source)
    kinds = {place.tensor: kind for place in found.values()} | _embeddings(file, embeddings)
    calibrated = None
    if kind in blocks.KINDS:
        form = blocks.form_of(kind)
        calibrated = CalibratedWeights(adapted, form, lambda model: _to_encode(layers_by_name(model), found, form))
    merge = _Merge(target, adapted, file, found, kinds, calibrated)
    return Job(_size(target, file, kinds), lambda: _build(merge), calibrated=calibrated)


def _to_encode(layers: dict[str, Any], names: Iterable[str], form: Form) -> list[list[str]]:
    """Those of the layers ``names`` that need new scales to be in that form."""
    return [
        [name] for name in names if finished_in(form, [layers[name]]) is None and stored_in(form, layers[name]) is None
    ]


def _embeddings(file: pathlib.Path, kind: str | None) -> dict[str, str]:
    """The types of the embeddings and the output head of a file, if they have to change."""
    tensors = {tensor.name: tensor.type_name for tensor in read_header(file).tensors}
    if kind is None:
        return {}
    return {
        name: kind.upper() for name in gguf_conversion.EMBEDDINGS if tensors.get(name, kind.upper()) != kind.upper()
    }


def _size(target: str, file: pathlib.Path, kinds: dict[str, str]) -> int:
    """The size of the file if its tensors have these types."""
    nbytes = file.stat().st_size + _MORE_METADATA
    for tensor in read_header(file).tensors:
        try:
            nbytes += nbytes_of(kinds.get(tensor.name, tensor.type_name), tensor.shape) - tensor.nbytes
        except ValueError as error:
            raise UserError(f"{target}: {tensor.name} has {error}; use --to gguf:f16") from error
    return nbytes


def _build(merge: _Merge) -> Callable[[pathlib.Path], None]:
    loader = dataclasses.replace(merge.adapted.loader, compute=torch.float32)  # of the adapter too
    model = dataclasses.replace(merge.adapted, loader=loader).load()
    return functools.partial(_write, merge, layers_by_name(model))


def _write(merge: _Merge, layers: dict[str, Any], path: pathlib.Path) -> None:
    in_file = {tensor.name: tensor for tensor in read_header(merge.file).tensors}
    encoders = {kind: Encoder(blocks.form_of(kind)) for kind in merge.kinds.values() if kind in blocks.KINDS}
    replaced = {name: _retyped(merge.target, merge.file, in_file[name], kind) for name, kind in merge.kinds.items()}
    for layer, place in merge.places.items():
        old = replaced[place.tensor]
        data = functools.partial(_merged, merge, layers[layer], layer, place, old.kind, encoders.get(old.kind))
        replaced[place.tensor] = dataclasses.replace(old, data=data)
    rewrite(merge.file, path, replaced)
    for encode in encoders.values():
        encode.report()


def _merged(merge: _Merge, layer: Any, name: str, place: Place, kind: str, encode: Encoder | None) -> Any:
    """The bytes of the weight of a layer with its adapter."""
    before, after = (weight.cpu()[place.rows] for weight in _before_and_after(merge, layer, name))
    if encode is None:
        try:
            return converted(kind, after)
        except ValueError as error:
            raise UserError(f"{merge.target}: {name}: {first_line(error)}; use --to gguf:bf16") from error
    calibrated = None if merge.calibrated is None else merge.calibrated.weights.get(name)
    finished = finished_in(encode.form, [layer]) if calibrated is None else calibrated
    own = stored_in(encode.form, layer) if finished is None else finished
    if own is not None:
        own = own.to("cpu")
        own = own if isinstance(place.rows, slice) else select_rows(own, place.rows)
    if finished is None or own is None:
        own = encode(before, after, own, seed_of(f"{name}.weight"))
    return packed(kind, own)


def _before_and_after(merge: _Merge, layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """The weight of a layer, and its sum with the adapters. Dense weights are read from the file, in its precision."""
    if any(layers_of(layer)):
        return before_and_after(layer)
    before = merge.weights.decode(f"{name}.weight")
    return before, before + sum(layer.get_delta_weight(adapter).float().cpu() for adapter in layer.active_adapters)


def _retype(target: str, source: ModelSource, kind: str, embeddings: str | None) -> Job:
    """The file with all its matrices in the type ``kind``."""
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
        if tensor.type_name == "NVFP4":  # other tensors have factors of its scales
            raise UserError(f"{target}: {tensor.name} of {source.name} is in NVFP4; use --to dense")
        is_table = tensor.name in gguf_conversion.EMBEDDINGS
        new = gguf_conversion.embeddings_kind(embeddings, kind) if is_table else kind
        if new != tensor.type_name:
            kinds[tensor.name] = new

    def write(path: pathlib.Path) -> None:
        in_file = {tensor.name: tensor for tensor in header.tensors}
        rewrite(file, path, {name: _retyped(target, file, in_file[name], kind) for name, kind in kinds.items()})

    return Job(_size(target, file, kinds), lambda: write)


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
