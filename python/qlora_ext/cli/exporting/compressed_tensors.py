"""The targets ``compressed-tensors:...``: a merged 4-bit model for vLLM, SGLang and transformers."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..models.adapted import Adapted
from ..models.loading import load_dense, stored_forms
from ..models.pretrained import has_4bit_blocks, is_4bit, load_config
from ..models.size import model_size
from .job import Job
from .model_directories import check_linear, find_model, size_of, writer
from .trained_for import trained_for

if TYPE_CHECKING:
    from torch import Tensor

    from ...checkpoints.compressed_tensors_files import Kind


def prepare(arguments: argparse.Namespace, name: str) -> Job:
    """The merged model in that kind of 4-bit weights."""
    from ...checkpoints.compressed_tensors_files import KINDS
    from ...nn import Linear4bit, layers_of, quantize_model

    kind = KINDS[name]
    adapted, skeleton = find_model(arguments)
    loader = adapted.loader
    with torch.device("meta"):
        quantized = quantize_model(skeleton.to(loader.dtype), **kind.form.keywords)
    check_linear(arguments.to, adapted, quantized)
    stored = getattr(load_config(adapted.source), "quantization_config", None) or {}
    if stored.get("quant_method") == "compressed-tensors" and not _is_reencoded(adapted, name):
        if stored.get("format") != kind.format.name:
            raise UserError(
                f"--to {arguments.to}: {adapted.source.name} is in {stored.get('format')} already, and rounding it to "
                "another 4-bit format would cost accuracy; use the target of its own format, or --to dense"
            )
        return Job(size_of(model_size(quantized).bytes, adapted), lambda: _in_own_format(adapted))
    names = [
        name
        for name, layer in layers_of(quantized)
        if isinstance(layer, Linear4bit) and kind.fits((layer.out_features, layer.in_features))
    ]
    if not names:
        raise UserError(
            f"--to {arguments.to}: {adapted.source.name} has no layer with rows of a multiple of "
            f"{kind.form.block_size} weights; use --to dense"
        )
    return Job(size_of(model_size(quantized).bytes, adapted), lambda: _build(adapted, kind, names))


def _is_reencoded(adapted: Adapted, name: str) -> bool:
    """Whether training has encoded the base in the format ``name``."""
    from ...integrations.peft.served import is_in

    forms = stored_forms(adapted.source, load_config(adapted.source)) or {}
    return trained_for(adapted.adapter) == name and not all(is_in(form, name) for form in forms.values())


def _in_own_format(adapted: Adapted) -> Callable[[pathlib.Path], None]:
    """Merges into the codes of a checkpoint of compressed-tensors, under its scales."""
    from ...integrations.peft import merge_to_4bit

    model = adapted.load()
    if adapted.adapter is not None:
        model, error = merge_to_4bit(model)
        print(f"the codes retain {error.retained:.1%} of the adapter's update")
    return writer(model, adapted, lambda model, partial: model.save_pretrained(partial))


def _build(adapted: Adapted, kind: Kind, names: list[str]) -> Callable[[pathlib.Path], None]:
    four_bit = adapted.adapter is not None or is_4bit(adapted.source) or has_4bit_blocks(adapted.source)
    model = adapted.load() if four_bit else load_dense(adapted.source, adapted.loader.dtype, adapted.loader.device)
    tensors = dict(_encoded(model, kind, names))
    if adapted.adapter is not None:
        model = model.merge_and_unload()
    elif four_bit:
        model = model.dequantize()
    state = model.state_dict()
    for layer, parts in tensors.items():
        del state[f"{layer}.weight"]
        state |= {f"{layer}.{name}": tensor for name, tensor in parts.items()}
    linear = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    model.config.quantization_config = kind.config([name for name in linear if name not in tensors])
    return writer(model, adapted, lambda model, partial: model.save_pretrained(partial, state_dict=state))


def _encoded(model: Any, kind: Kind, names: list[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each layer that is 4-bit in the result, by its name.

    Layers that are dense in a 4-bit base stay dense. A base in the same form keeps its codes where there is no adapter.
    """
    from ...checkpoints.compressed_tensors_files import joined_layers
    from ...integrations.peft.merge import Over4bit
    from ...merged import seed_of
    from ...nn import Linear4bit, layers_of
    from .weights import Encoder, before_and_after, finished_in, layers_by_name, stored_in

    kinds = (Over4bit, Linear4bit) if any(layers_of(model)) else (torch.nn.Linear,)
    modules = layers_by_name(model)
    layers = {name: modules[name] for name in names if isinstance(modules.get(name), kinds)}
    encode = Encoder(kind.form)
    for group in joined_layers(layers) if kind.has_factor else [[name] for name in layers]:
        parts = [before_and_after(layers[name]) for name in group]
        before, after = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        stored = None if kind.has_factor else stored_in(kind.form, layers[group[0]])
        w4 = finished_in(kind.form, [layers[name] for name in group])
        if w4 is None:
            w4 = encode(before, after, stored, seed_of(f"{group[0]}.weight"))
        rows = [len(weight) for weight, _ in parts]
        yield from zip(group, kind.tensors(w4.to("cpu"), rows), strict=True)
    encode.report()
