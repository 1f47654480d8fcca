"""The targets ``gguf:...`` for models that are no GGUF file: their weights, merged with the adapter, as one."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gguf
import torch
from torch import Tensor

from qlora_ext.calibration import Calibration
from qlora_ext.gguf import blocks
from qlora_ext.gguf.file import TABLES, VERSION_KEY
from qlora_ext.merging.codes import seed_of
from qlora_ext.merging.weights import weights_of
from qlora_ext.version import VERSION
from qlora_ext.weight import Weight4bit

from ..errors import UserError, first_line
from ..gguf import metadata, tokenizer
from ..gguf.layout import FileTensor, file_tensors
from ..gguf.writing import DENSE_KINDS, NewTensor, converted, nbytes_of, packed, write_tensors
from ..models.adapted import Adapted
from ..models.loading import load_dense
from ..models.pretrained import is_4bit, load_config
from . import modelfile
from .calibrated import calibrated_weights
from .gguf_description import add_description
from .job import Job
from .lora import architecture_of, check_mergeable, tied_layer
from .merging import untie
from .targets import ExportRequest
from .weights import Encoder, MergedWeights, Read, is_linear, report

_ROUTER = "ffn_gate_inp.weight"
_MORE_METADATA = 1 << 16  # bytes


def is_calibrated(kind: str) -> bool:
    """Whether a calibration encodes weights of the type ``kind``."""
    return kind in blocks.KINDS and blocks.form_of(kind).bits == 4


def embeddings_kind(chosen: str | None, kind: str) -> str:
    """The type of the embeddings and the output head: by default 8 bits where the others have fewer."""
    return chosen.upper() if chosen is not None else "Q8_0" if kind in blocks.KINDS else kind


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """A checked export: what the file has beside the values of the weights.

    Attributes:
        target: the option and its value, for error messages.
        kind: the type that the target names.
        sampling: from ``modelfile.sampling``.
        kinds: the tensors that come from weights, and their types.
        factors: tensors that do not, float32.
        unties: whether the adapter changes the output head or the embeddings, although the base ties them.
    """

    target: str
    adapted: Adapted
    config: Any
    architecture: str
    kind: str
    words: tokenizer.GGUFTokenizer
    sampling: dict[str, int | float]
    kinds: list[tuple[FileTensor, str]]
    factors: dict[str, Tensor]
    unties: bool


def prepare(request: ExportRequest, kind: str, adapted: Adapted, skeleton: Any) -> Job:
    """A file with the weights in the type ``kind``.

    Args:
        skeleton: the dense model, without memory for its weights.
    """
    target, source = f"--to {request.to}", adapted.source
    config = load_config(source)
    architecture = architecture_of(target, source, config)
    if adapted.adapter is not None:
        check_mergeable(target, adapted.adapter)
    unties = adapted.adapter is not None and tied_layer(adapted.adapter, skeleton) is not None
    if unties or metadata.needs_head(architecture):
        head = skeleton.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    sampling = modelfile.sampling(modelfile.generation_config(source))
    rows = skeleton.get_input_embeddings().weight.shape[0]
    try:
        metadata.check(architecture, config)
        tensors = file_tensors(architecture, skeleton, _weights(skeleton))
        words = tokenizer.convert(adapted.tokenizer, config, rows)
    except ValueError as error:
        raise UserError(f"{target}: {source.name}: {first_line(error)}; or use --to dense") from error
    factors, embeddings = metadata.rope_tensors(config), embeddings_kind(request.embeddings, kind)
    kinds, nbytes = [], words.nbytes + _MORE_METADATA + sum(tensor.nbytes for tensor in factors.values())
    for tensor in tensors:
        kinds.append((tensor, kind_of(tensor, kind, embeddings)))
        try:
            nbytes += nbytes_of(kinds[-1][1], tensor.shape)
        except ValueError as error:
            raise UserError(f"{target}: {tensor.weight} has {error}; use --to gguf:f16") from error
    window = metadata.ignored_window(config)
    if window is not None:
        print(f"llama.cpp attends to all tokens of this model, which has a window of {window}; longer texts differ")
    conversion = _Conversion(target, adapted, config, architecture, kind, words, sampling, kinds, factors, unties)
    return Job(nbytes, functools.partial(_build, conversion), calibrates=adapted if is_calibrated(kind) else None)


def calibrated(
    adapted: Adapted, kind: str, kinds: Iterable[tuple[FileTensor, str]], calibration: Calibration | None
) -> dict[str, Weight4bit]:
    """The weights of a target of the 4-bit type ``kind`` that a calibration encodes.

    Args:
        kinds: the tensors that come from weights, and their types.
    """
    if calibration is None:
        return {}
    named = [
        tensor.weight.removesuffix(".weight") for tensor, own in kinds if own == kind and tensor.name not in TABLES
    ]
    return calibrated_weights(adapted, blocks.form_of(kind), lambda model: _to_encode(model, kind, named), calibration)


def _to_encode(model: Any, kind: str, names: list[str]) -> list[list[str]]:
    """Selects from the weights ``names`` those of linear layers that need new scales in the type ``kind``."""
    weights, found = weights_of(model), []
    for name in dict.fromkeys(names):
        weight = weights.get(f"{name}.weight")
        if weight is not None and is_linear(weight):
            w4 = weight.stored if (trained := weight.trained) is None else trained
            if w4 is None or blocks.in_form_of(kind, w4) is None:
                found.append([name])
    return found


def _weights(skeleton: Any) -> list[str]:
    """The names of the weights of the language model; of those that are tied, the first."""
    names: dict[int, str] = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    config = skeleton.config
    if config.get_text_config() is config:
        return [*names.values()]
    return [name for name in names.values() if ".language_model." in name or name.startswith("lm_head.")]


def kind_of(tensor: FileTensor, kind: str, embeddings: str) -> str:
    """The type that a tensor gets, where layers get ``kind`` and embeddings get ``embeddings``."""
    if not tensor.is_matrix or tensor.name.endswith(_ROUTER):
        return "F32"  # llama.cpp requires it
    return embeddings if tensor.name in TABLES else kind


def _build(conversion: _Conversion, calibration: Calibration | None) -> Callable[[pathlib.Path], None]:
    adapted = conversion.adapted
    encoded = calibrated(adapted, conversion.kind, conversion.kinds, calibration)
    if adapted.adapter is not None or is_4bit(adapted.source):
        model = adapted.load_to_merge()
        if conversion.unties:
            untie(model)
            print("the adapter changes the output head or the embeddings, which are tied: both are written")
    else:
        dtype = getattr(conversion.config, "dtype", None) or adapted.loader.dtype
        model = load_dense(adapted.source, dtype, adapted.loader.device)
    return functools.partial(_write, conversion, MergedWeights(model, encoded))


def _write(conversion: _Conversion, weights: MergedWeights, path: pathlib.Path) -> None:
    kind = conversion.kind
    writer = gguf.GGUFWriter(os.fspath(path), conversion.architecture)
    writer.add_string(VERSION_KEY, VERSION)
    shapes = {name: tuple(values.shape) for name, values in conversion.factors.items()}
    shapes |= {tensor.name: tensor.shape for tensor, _ in conversion.kinds}
    add_description(writer, conversion.adapted, shapes, conversion.sampling)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{'MXFP4_MOE' if kind == 'MXFP4' else kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    metadata.add_hyperparameters(writer, conversion.config)
    conversion.words.add_to(writer)
    encoders = {kind: Encoder(blocks.form_of(kind)) for _, kind in conversion.kinds if kind in blocks.KINDS}
    tensors = [
        NewTensor(name, tuple(values.shape), "F32", values.nbytes, functools.partial(converted, "F32", values))
        for name, values in conversion.factors.items()
    ]
    for tensor, kind in conversion.kinds:
        values = functools.partial(data, conversion.target, weights, tensor, kind, encoders.get(kind))
        tensors.append(NewTensor(tensor.name, tensor.shape, kind, nbytes_of(kind, tensor.shape), values))
    write_tensors(writer, tensors)
    report(encoders.values())


def data(target: str, weights: MergedWeights, tensor: FileTensor, kind: str, encode: Encoder | None) -> Any:
    """The bytes of a tensor of the file."""
    read = weights.read(tensor.weight)
    try:
        if encode is None:
            assert kind in DENSE_KINDS
            return converted(kind, tensor.values(read[1]))
        return torch.cat([*_encoded(tensor, kind, read, encode)]).numpy()
    except ValueError as error:
        raise UserError(f"{target}: {tensor.weight}: {first_line(error)}; use --to gguf:bf16") from error


def _encoded(tensor: FileTensor, kind: str, read: Read, encode: Encoder) -> Iterator[Tensor]:
    """The bytes of a tensor of one of ``blocks.KINDS``, matrix by matrix."""
    *_, rows, width = tensor.shape
    before, after = (tensor.values(weight).reshape(-1, rows, width) for weight in read[:2])
    stored = None if read[2] is None else blocks.in_form_of(kind, read[2])
    matrices = None if stored is None else tensor.packed_rows(stored)
    for e in range(len(before)):
        own = None if matrices is None else matrices.matrix(e)
        w4 = encode(before[e], after[e], own, seed_of(f"{tensor.name}.{e}"))
        yield torch.from_numpy(packed(kind, w4).copy())
