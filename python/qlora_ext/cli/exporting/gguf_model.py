"""The targets ``gguf:...``: the GGUF file that the adapter was trained on, with the adapter merged into its weights."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...gguf.file import read_header
from ..errors import UserError, first_line
from ..models import validate_model
from ..models.adapted import Adapted
from ..models.loading import stored_forms
from ..models.pretrained import load_config
from .job import Job
from .lora import architecture_of, check_plain, ranks_of
from .model_directories import find_model
from .trained_for import trained_for

if TYPE_CHECKING:
    from torch import Tensor

    from ...gguf import GGUFWeights
    from ...gguf.adapter import Place
    from ...gguf.rewriting import Replacement

_MORE_METADATA = 1 << 16  # bytes


@dataclasses.dataclass(frozen=True)
class _Merge:
    """A checked export: the type of the new tensors, and where the layers are whose weights change."""

    adapted: Adapted
    file: pathlib.Path
    kind: str
    places: dict[str, Place]

    @functools.cached_property
    def weights(self) -> GGUFWeights:
        """The weights in the file."""
        from ...gguf import GGUFWeights

        source = self.adapted.source
        return GGUFWeights(self.file, validate_model.skeleton(source, load_config(source)))


def prepare(arguments: argparse.Namespace, kind: str) -> Job:
    """The merged file, in which the changed weights have the type ``kind``."""
    from ...gguf.adapter import places
    from ...gguf.rewriting import bytes_per_row
    from ...nn import to_be_quantized

    target = f"--to {arguments.to}"
    if arguments.adapter is None:
        raise UserError(f"{target}: expected an adapter (--adapter), got a model; convert it with llama.cpp")
    adapted, skeleton = find_model(arguments)
    source = adapted.source
    assert adapted.adapter is not None
    if source.gguf_file is None:
        raise UserError(
            f"{target}: expected an adapter whose base is a GGUF file, got {source.name}; use --to dense, and "
            "convert_hf_to_gguf.py of llama.cpp"
        )
    check_plain(target, adapted.adapter)
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
    file = pathlib.Path(source.path) / source.gguf_file
    old, state = {tensor.name: tensor.nbytes for tensor in read_header(file).tensors}, skeleton.state_dict()
    nbytes = file.stat().st_size + _MORE_METADATA
    for layer, place in found.items():
        rows, width = state[f"{layer}.weight"].shape
        size = bytes_per_row(kind, width)
        if size is None:
            raise UserError(f"{target}: {layer} has rows of {width} weights, no multiple of a block; use --to gguf:f16")
        nbytes += rows * size - old[place.tensor]
    return Job(nbytes, lambda: _build(_Merge(adapted, file, kind, found)))


def _build(merge: _Merge) -> Callable[[pathlib.Path], None]:
    from ...gguf.rewriting import rewrite

    replaced = dict(_replacements(merge))
    return lambda path: rewrite(merge.file, path, replaced)


def _replacements(merge: _Merge) -> Iterator[tuple[str, Replacement]]:
    """The new tensors, by their names in the file."""
    import torch

    from ...checkpoints import select_rows
    from ...form import Form
    from ...gguf import blocks, rewriting
    from ...merged import seed_of
    from .weights import Encoder, finished_in, layers_by_name, stored_in

    kind, loader = merge.kind, dataclasses.replace(merge.adapted.loader, compute=torch.float32)  # of the adapter too
    model = dataclasses.replace(merge.adapted, loader=loader).load()
    layers = layers_by_name(model)
    form = blocks.form_of(kind) if kind in blocks.KINDS else Form()
    encode = Encoder(form)
    for layer, place in merge.places.items():
        before, after = (weight.cpu()[place.rows] for weight in _before_and_after(merge, layers[layer], layer))
        if kind in rewriting.DENSE_KINDS:
            yield place.tensor, rewriting.converted(kind, after)
            continue
        stored = stored_in(form, layers[layer])
        if stored is not None:
            stored = stored.to("cpu")
            stored = stored if isinstance(place.rows, slice) else select_rows(stored, place.rows)
        w4 = finished_in(form, [layers[layer]])
        if w4 is None:
            w4 = encode(before, after, stored, seed_of(f"{layer}.weight"))
        elif not isinstance(place.rows, slice):
            w4 = select_rows(w4.to("cpu"), place.rows)
        yield place.tensor, rewriting.packed(kind, w4.to("cpu"))
    encode.report()


def _before_and_after(merge: _Merge, layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """The weight of a layer, and its sum with the adapters. Dense weights are read from the file, in its precision."""
    from ...nn import layers_of
    from .weights import before_and_after

    if any(layers_of(layer)):
        return before_and_after(layer)
    before = merge.weights.decode(f"{name}.weight")
    return before, before + sum(layer.get_delta_weight(adapter).float().cpu() for adapter in layer.active_adapters)
