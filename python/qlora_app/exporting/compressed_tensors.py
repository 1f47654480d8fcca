"""The targets ``compressed-tensors:...``: a merged 4-bit model for vLLM, SGLang and transformers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from qlora_ext.merging.weights import ModelWeight, weights_of

from ..errors import UserError, first_line
from ..models import validate_model
from ..models.adapted import Adapted
from ..models.loading import stored_layers
from ..models.pretrained import load_config
from ..models.size import model_size
from .calibrated import calibrated_weights
from .job import Job
from .merging import load, loads_4bit, merge, merge_codes
from .model_directories import check_linear, find_model, size_of, writer
from .targets import ExportRequest
from .trained_for import trained_for
from .weights import Encoder, joined, read, report

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_ext.calibration import Calibration
    from qlora_ext.checkpoints.compressed_tensors_files import Kind
    from qlora_ext.nn import Experts4bit
    from qlora_ext.weight import Weight4bit


def prepare(request: ExportRequest) -> Job:
    """The merged model in that kind of 4-bit weights."""
    from qlora_ext.checkpoints.compressed_tensors_files import KINDS
    from qlora_ext.integrations.transformers.checkpoint.expert_stacks import layers_of_experts
    from qlora_ext.nn import Linear4bit, layers_of, quantize_model

    kind = KINDS[request.kind]
    adapted, skeleton = find_model(request)
    loader = adapted.loader
    with torch.device("meta"):
        quantized = quantize_model(skeleton.to(loader.dtype), **kind.form.keywords)
    experts = check_linear(request.to, adapted, quantized)
    stored = getattr(load_config(adapted.source), "quantization_config", None) or {}
    in_own = stored.get("quant_method") == "compressed-tensors" and not loader.requantize
    if in_own and not _is_reencoded(adapted, request.kind):
        if stored.get("format") != kind.format.name:
            raise UserError(
                f"--to {request.to}: {adapted.source.name} is in {stored.get('format')} already, and rounding it to "
                "another 4-bit format would cost accuracy; use the target of its own format, or --to dense"
            )
        return Job(size_of(model_size(quantized).bytes, adapted), lambda _: _in_own_format(adapted))
    names = [
        name
        for name, layer in layers_of(quantized)
        if isinstance(layer, Linear4bit) and kind.fits((layer.out_features, layer.in_features))
    ]
    fitting = {name: layer for name, layer in experts.items() if all(map(kind.fits, layer.packed_shapes.values()))}
    if not names and not fitting:
        raise UserError(
            f"--to {request.to}: {adapted.source.name} has no layer with rows of a multiple of "
            f"{kind.form.block_size} weights; use --to dense"
        )
    dense = validate_model.skeleton(adapted.source, load_config(adapted.source))  # which has transformers' conversions
    try:
        parts = {
            f"{name}.{parameter}": layers_of_experts(dense, f"{name}.{parameter}", shape)
            for name, layer in experts.items()
            for parameter, shape in layer.packed_shapes.items()
        }
    except ValueError as error:
        raise UserError(f"--to {request.to}: {first_line(error)}; use --to dense") from error
    plan = _Plan(adapted, kind, names, fitting, parts)
    return Job(size_of(model_size(quantized).bytes, adapted), functools.partial(_build, plan), calibrates=adapted)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A checked export.

    Attributes:
        names: of the linear layers that are 4-bit in the result.
        experts: those that are 4-bit in the result, by name, without memory for their weights.
        parts: for each stack of experts the names of each expert's layers in the result.
    """

    adapted: Adapted
    kind: Kind
    names: list[str]
    experts: dict[str, Experts4bit]
    parts: dict[str, list[list[str]]]


def _is_reencoded(adapted: Adapted, name: str) -> bool:
    """Whether training has encoded the base in the format ``name``."""
    from qlora_ext.merging.target_format import is_in

    forms = stored_layers(adapted.source, load_config(adapted.source), adapted.loader.requantize) or {}
    return trained_for(adapted.adapter) == name and not all(is_in(form, name) for form in forms.values())


def _in_own_format(adapted: Adapted) -> Callable[[pathlib.Path], None]:
    """Merges into the codes of a checkpoint of compressed-tensors, under its scales."""
    model = adapted.load()
    if adapted.adapter is not None:
        model = merge(model, lambda model: merge_codes(model)[0])
    return writer(model, adapted, lambda model, partial: model.save_pretrained(partial))


def _build(plan: _Plan, calibration: Calibration | None) -> Callable[[pathlib.Path], None]:
    from qlora_ext.integrations.transformers.checkpoint.expert_stacks import DenseExperts, alternates

    adapted, kind = plan.adapted, plan.kind
    calibrated = calibrated_weights(
        adapted, kind.form, lambda model: [*_encoded(_layers(model, plan.names), kind)], calibration
    )
    model = load(adapted)
    encode = Encoder(kind.form)
    tensors = dict([*_linear(model, plan, calibrated, encode), *_experts(model, plan, encode)])
    report([encode])
    if adapted.adapter is not None:
        model = merge(model)
    elif loads_4bit(adapted):
        model = model.dequantize()
    state = model.state_dict()
    for stack, parts in plan.parts.items():
        if parts[0][0] not in tensors:
            continue
        del state[stack]
        if (bias := state.pop(f"{stack}_bias", None)) is not None:
            names = [[f"{name}.bias" for name in layers] for layers in parts]
            state |= DenseExperts(names, alternates(model.get_submodule(stack.rpartition(".")[0])), False, "").write(
                bias
            )
    for layer, of_layer in tensors.items():
        state.pop(f"{layer}.weight", None)
        state |= {f"{layer}.{name}": tensor for name, tensor in of_layer.items()}
    model.config.quantization_config = kind.config(_ignored(model, plan, tensors))
    return writer(model, adapted, lambda model, partial: model.save_pretrained(partial, state_dict=state))


def _ignored(model: Any, plan: _Plan, tensors: Mapping[str, object]) -> list[str]:
    """The names of the dense layers that programs may take for linear ones, in the model and in the files.

    Servers make linear layers of routers, and of each expert.
    """
    from transformers.core_model_loading import revert_weight_conversion

    dense = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, torch.nn.Embedding) and name not in tensors
        if isinstance(weight := module._parameters.get("weight"), torch.Tensor) and weight.ndim == 2
    ]
    dense += [name for parts in plan.parts.values() for layers in parts for name in layers if name not in tensors]
    stored = revert_weight_conversion(
        model, {f"{name}.weight": torch.empty(0, dtype=torch.float32, device="cpu") for name in dense}
    )
    return [*dict.fromkeys([*dense, *(name.removesuffix(".weight") for name in stored)])]


def _layers(model: Any, names: list[str]) -> dict[str, ModelWeight]:
    """Selects from the linear layers ``names`` those that are 4-bit in the result, and returns their weights.

    Layers that are dense in a 4-bit base stay dense.
    """
    from qlora_ext.nn import layers_of

    weights, four_bit = weights_of(model), any(layers_of(model))
    found = ((name, weights.get(f"{name}.weight")) for name in names)
    return {name: w for name, w in found if w is not None and w.is_4bit == four_bit and w.over_dense is None}


def _groups(layers: Mapping[str, ModelWeight], kind: Kind) -> Iterator[list[str]]:
    """The names of the layers. Layers that share a factor form a group."""
    from qlora_ext.checkpoints.compressed_tensors_files import joined_layers

    return joined_layers(layers) if kind.has_factor else ([name] for name in layers)


def _stored(w4: Weight4bit | None, kind: Kind) -> Weight4bit | None:
    """The 4-bit weight if the result has its scales."""
    return None if w4 is None or w4.form != kind.form else w4


def _encoded(layers: Mapping[str, ModelWeight], kind: Kind) -> Iterator[list[str]]:
    """The groups of layers that need new scales."""
    for group in _groups(layers, kind):
        keeps_scales = not kind.has_factor and _stored(layers[group[0]].stored, kind) is not None
        if not keeps_scales and joined(kind.form, [layers[name] for name in group]) is None:
            yield group


def _linear(
    model: Any, plan: _Plan, calibrated: Mapping[str, Weight4bit], encode: Encoder
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each linear layer that is 4-bit in the result, by its name.

    A base in the same form keeps its codes where there is no adapter.
    """
    from qlora_ext.merging.codes import seed_of

    kind = plan.kind
    layers = _layers(model, plan.names)
    for group in _groups(layers, kind):
        if group[0] in calibrated:
            for name in group:
                yield name, kind.tensors(calibrated[name], [calibrated[name].shape[0]])[0]
            continue
        weights = [layers[name] for name in group]
        w4 = joined(kind.form, weights)
        if w4 is None:
            pairs = (weight.before_and_after() for weight in weights)
            before, after = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            stored = None if kind.has_factor else _stored(weights[0].stored, kind)
            w4 = encode(before, after, stored, seed_of(f"{group[0]}.weight"))
        rows = [weight.module.out_features for weight in weights]
        yield from zip(group, kind.tensors(w4.to("cpu"), rows), strict=True)


def _experts(model: Any, plan: _Plan, encode: Encoder) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each layer of each expert, like ``_linear``."""
    from qlora_ext.checkpoints import select_rows
    from qlora_ext.checkpoints.rows import grouped_rows
    from qlora_ext.integrations.transformers.checkpoint.expert_stacks import alternates
    from qlora_ext.merging.codes import seed_of
    from qlora_ext.nn import layers_of

    weights, four_bit = weights_of(model), any(layers_of(model))
    stacks = [(f"{path}.{name}", layout) for path, layout in plan.experts.items() for name in layout.packed_shapes]
    for name, layout in stacks:
        if weights[name].is_4bit != four_bit:
            continue
        *values, w4 = read(weights[name])
        before, after = map(layout.as_quantized, values)
        stored, seed = _stored(w4, plan.kind), seed_of(name)
        for e, layers in enumerate(plan.parts[name]):
            w4 = encode(before[e], after[e], None if stored is None else stored.matrix(e), seed_of(f"{seed}.{e}"))
            if len(layers) > 1 and alternates(layout):
                w4 = select_rows(w4, grouped_rows(len(before[e])))
            rows = [len(before[e]) // len(layers)] * len(layers)
            yield from zip(layers, plan.kind.tensors(w4.to("cpu"), rows), strict=True)
