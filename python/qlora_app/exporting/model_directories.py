"""The targets that are model directories of transformers: ``dense``, ``nf4`` and ``bitsandbytes``."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_ext.formats import NF4

from ..errors import UserError
from ..models import validate_model
from ..models.adapted import Adapted, find_adapted
from ..models.adapter_files import config_of
from ..models.loading import load_dense, stored_layers
from ..models.pretrained import dense_name, has_4bit_blocks, is_4bit, load_config, restore_use_cache
from ..models.size import model_size
from ..models.sources import PROVENANCE
from ..outputs.files import write_json
from ..quantization import calibrate
from .job import Job
from .lora import check_biases
from .merging import merge, merge_codes
from .targets import MERGE_ERROR, ExportRequest
from .trained_for import trained_for

if TYPE_CHECKING:
    from qlora_ext.calibration import Calibration
    from qlora_ext.nn import Experts4bit

_BYTES_PER_TOKEN = 64  # of a tokenizer's files, with its merges
_OTHER_FILES = 1 << 16  # bytes


def find_model(request: ExportRequest) -> tuple[Adapted, Any]:
    """The model and its adapter, and the dense model without memory for its weights."""
    adapted = find_adapted(request)
    if adapted.adapter is not None and "target_modules" not in config_of(adapted.adapter):
        kind = config_of(adapted.adapter).get("peft_type")
        raise UserError(
            f"--adapter {adapted.adapter}: expected an adapter of weights, got {kind}, which cannot be merged into a "
            "model; load it with PEFT instead"
        )
    config = load_config(adapted.source)
    validate_model.check_room(adapted.source, config)
    skeleton = validate_model.skeleton(adapted.source, config)
    if adapted.adapter is not None:
        check_biases(request.typed, adapted.adapter, skeleton)
    return adapted, skeleton


def size_of(weights: int, adapted: Adapted) -> int:
    """The estimated size of a directory with that many bytes of weights."""
    return weights + _BYTES_PER_TOKEN * len(adapted.tokenizer) + _OTHER_FILES


def writer(model: Any, adapted: Adapted, save: Callable[[Any, pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    restore_use_cache(model, adapted.source)

    def write(partial: pathlib.Path) -> None:
        save(model, partial)
        adapted.tokenizer.save_pretrained(partial)

    return write


def prepare(request: ExportRequest) -> Job:
    return {"dense": _dense, "nf4": _nf4, "bitsandbytes": _bitsandbytes}[request.to](request)


def _dense(request: ExportRequest) -> Job:
    """The merged, or decoded, model in ``--dtype``."""
    adapted, skeleton = find_model(request)
    loader = adapted.loader

    def build(_: object) -> Callable[[pathlib.Path], None]:
        if adapted.adapter is not None:
            model = merge(adapted.load())
        elif is_4bit(adapted.source):
            model = loader.while_loading().dequantize()
        else:
            model = load_dense(adapted.source, loader.dtype, loader.device)
        return writer(model, adapted, lambda model, partial: model.save_pretrained(partial))

    return Job(size_of(model_size(skeleton.to(loader.dtype)).bytes, adapted), build)


def _nf4(request: ExportRequest) -> Job:
    """The model in 4 bits as ``qlora_ext`` saves it. The adapter is merged into codes under the scales of the base."""
    import torch

    from qlora_ext.calibration import calibration_of
    from qlora_ext.dtypes import computing_dtype
    from qlora_ext.integrations.peft import merge_calibrated
    from qlora_ext.nn import quantize_model

    adapted, skeleton = find_model(request)
    loader = adapted.loader
    with torch.device("meta"):
        quantized = quantize_model(skeleton.to(loader.dtype), **loader.form.keywords)

    def build(calibration: Calibration | None) -> Callable[[pathlib.Path], None]:
        records: dict[str, Any] = {}

        def into_codes(model: Any) -> Any:
            if calibration is not None:
                return merge_calibrated(model, calibration, computing_dtype(loader.dtype, loader.device))
            model, error = merge_codes(model)
            records[MERGE_ERROR] = dataclasses.asdict(error)
            return model

        if adapted.adapter is not None:
            model = merge(adapted.load(), into_codes)
        else:
            model = loader.while_loading() if calibration is None else loader.dense_first(calibration)
            records[PROVENANCE] = {"model": dense_name(adapted.source), "kept": None}
        if calibration is not None:
            report = calibration_of(model)
            records[calibrate.RECORD] = calibrate.record(request, report)
            print(*calibrate.summary(report, calibration.distill), sep="\n")

        def save(model: Any, partial: pathlib.Path) -> None:
            model.save_pretrained(partial)
            for name, record in records.items():
                write_json(partial / name, record)

        return writer(model, adapted, save)

    has_codes = adapted.adapter is None and is_4bit(adapted.source)
    return Job(size_of(model_size(quantized).bytes, adapted), build, calibrates=None if has_codes else adapted)


def check_linear(target: str, adapted: Adapted, quantized: Any) -> dict[str, Experts4bit]:
    """Rejects a model with other 4-bit layers than linear ones and experts, given without memory for its weights.

    Args:
        target: the value of ``--to``, for the error message.

    Returns:
        The experts, by name.
    """
    from torch import nn

    from qlora_ext.nn import Experts4bit, Linear4bit, layers_of

    experts = {}
    for name, layer in layers_of(quantized):
        if isinstance(layer, Experts4bit):
            experts[name] = layer
        elif not isinstance(layer, Linear4bit) or layer.dense_class is not nn.Linear:
            raise UserError(
                f"--to {target}: {name} of {adapted.source.name} is not a linear layer, and that format has no other "
                "4-bit layers; use --to dense"
            )
    return experts


def _check_codes(adapted: Adapted, quantized: Any, experts: Mapping[str, Experts4bit]) -> None:
    """Rejects an adapter on a base whose codes bitsandbytes does not have, unless it was trained for NF4."""
    from qlora_ext.nn import layers_of

    forms = stored_layers(adapted.source, load_config(adapted.source), adapted.loader.requantize)
    read_in = {adapted.loader.served} - {None, NF4}
    if adapted.adapter is None or (forms is None and not read_in):
        return
    forms = forms or {}
    if trained_for(adapted.adapter) != NF4:
        codes = ", ".join(sorted({*(form.code for form in forms.values()), *map(str, read_in)}))
        raise UserError(
            f"--to bitsandbytes: the adapter was trained on weights in {codes}, which bitsandbytes does not have, and "
            "rounding them to NF4 would lose what was learnt; use --to dense, or train with --merge-aware nf4"
        )
    encoded = {f"{name}.weight" for name, _ in layers_of(quantized)}
    for name, form in forms.items():
        if name not in encoded and name.rpartition(".")[0] not in experts:
            raise UserError(
                f"--to bitsandbytes: {adapted.source.name} stores {name} in {form.code}, which bitsandbytes does not "
                "have, and training does not change it; use --to dense"
            )


def _with_merged_experts(model: Any) -> Any:
    """The model with dense experts, into which their adapters are merged, in place of 4-bit experts with adapters.

    ``merge_to_4bit`` merges those that were trained merge-aware: it has their rounding.
    """
    from qlora_ext.integrations.peft.experts import LoraExperts4bit

    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, LoraExperts4bit) and not isinstance(parent, LoraExperts4bit) and not child.merge_aware:
                setattr(parent, name, child.unload_and_optionally_merge_module(merge=True))
    return model


def _with_dense_others(model: Any) -> Any:
    """The model with packed experts, embeddings and heads decoded: bitsandbytes has linear layers of its codes only."""
    from qlora_ext.bitsandbytes_format import CODES
    from qlora_ext.integrations.transformers.modules import dense_modules
    from qlora_ext.nn import Embedding4bit, Experts4bit, TiedLinear4bit, layers_of

    heads = {*dense_modules(model).heads}
    for name, layer in [*layers_of(model)]:
        if isinstance(layer, Experts4bit):
            model.set_submodule(name, layer.to_experts())
        elif isinstance(layer, Embedding4bit | TiedLinear4bit) or (name in heads and layer.form.code not in CODES):
            model.set_submodule(name, layer.to_dense())
    model.tie_weights()
    return model


def _bitsandbytes(request: ExportRequest) -> Job:
    """The model in NF4, into whose codes the adapter is merged by the rounding of ``merge --4bit``.

    Experts, embeddings and heads that a file stores packed are dense: bitsandbytes has 4-bit linear layers only.
    """
    import torch

    from qlora_ext.integrations.bitsandbytes import save_pretrained
    from qlora_ext.nn import quantize_model

    adapted, skeleton = find_model(request)
    loader = adapted.loader
    with torch.device("meta"):
        experts = check_linear(
            "bitsandbytes", adapted, quantize_model(skeleton.to(loader.dtype), **loader.form.keywords)
        )
        dense = validate_model.skeleton(adapted.source, load_config(adapted.source)).to(loader.dtype)
        quantized = quantize_model(dense, keep=[*experts], **loader.form.keywords)
    _check_codes(adapted, quantized, experts)

    def build(_: object) -> Callable[[pathlib.Path], None]:
        if adapted.adapter is not None:
            model = merge(adapted.load(), lambda model: merge_codes(_with_merged_experts(model))[0])
        elif has_4bit_blocks(adapted.source) or (experts and not is_4bit(adapted.source)):
            model = loader.dense_first(keep=lambda model: [*experts])
        else:
            model = loader.while_loading()
        return writer(_with_dense_others(model), adapted, save)

    def save(model: Any, partial: pathlib.Path) -> None:
        save_pretrained(model, partial)
        if adapted.adapter is None:
            write_json(partial / PROVENANCE, {"model": dense_name(adapted.source), "kept": None})

    return Job(size_of(model_size(quantized).bytes, adapted), build)
