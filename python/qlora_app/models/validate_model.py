"""Checks that a model is complete: compares its files with its configuration, before and after loading."""

from __future__ import annotations

import math
import pathlib
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any

from qlora_ext.gguf import read_header
from qlora_ext.untrusted import excerpt, printable, read_json

from ..errors import UserError, first_line, reading
from ..vocabulary import vocabulary_size
from .sources import ModelSource

_INDEX = "model.safetensors.index.json"
# Buffers that older versions of the libraries saved, and newer versions compute.
_OLD_BUFFERS = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids)$")
_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")


def named(names: Collection[str], shown: int = 3) -> str:
    """The first few of some names, and the number of the others."""
    first = ", ".join(excerpt(name) for name in sorted(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def shapes(path: pathlib.Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, by name.

    Raises:
        UserError: the file is missing or damaged.
    """
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{printable(path)} is truncated or damaged: {first_line(error)}") from error


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model directory; empty if its weights have another format.

    Raises:
        UserError: a file is missing, or the index names one outside the directory. FileError: the index is damaged.
    """
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if not (directory / _INDEX).is_file():
        return []
    index = read_json(directory / _INDEX, {"weight_map": dict})
    names = sorted({str(name) for name in index["weight_map"].values()})
    for name in names:
        if pathlib.PurePath(name).name != name or not (directory / name).is_file():
            raise UserError(f"{printable(directory)}: {_INDEX} names {excerpt(name)}, which is not a file there")
    return [directory / name for name in names]


def skeleton(source: ModelSource, config: Any) -> Any:
    """The model of a configuration on the meta device, without memory for its weights.

    Raises:
        UserError: the configuration is invalid.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with reading("configuration", source.name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)


def check_room(source: ModelSource, config: Any) -> None:
    """Rejects a model whose configuration does not match its files, before anything is allocated.

    Raises:
        UserError: the configuration has more parameters than the files can hold, or tensors have other shapes.
    """
    import torch

    found: dict[str, list[int]]
    if source.gguf_file is not None:
        header = read_header(pathlib.Path(source.path) / source.gguf_file)
        found = {tensor.name: list(tensor.shape) for tensor in header.tensors}
        room = 2 * sum(map(math.prod, found.values()))  # a model may compute a part of its weights
    else:
        files = weight_files(source.directory) if source.directory is not None else []
        found = {name: shape for file in files for name, shape in shapes(file).items()}
        room = 2 * sum(file.stat().st_size for file in files)  # at most two parameters per byte (4 bits)
    if not found:
        return
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(found):
        raise UserError(
            f"{source.name} is incomplete: its configuration has {layers} layers, its files have {len(found)} weights"
        )
    model = skeleton(source, config)
    needed = sum(tensor.numel() for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    tied = sum(p.numel() for p in (model.get_output_embeddings() or torch.nn.Module()).parameters())
    if needed - tied > room:
        raise UserError(
            f"{source.name} is incomplete: its configuration needs {needed:,} parameters, its files hold at most "
            f"{room:,}"
        )
    if getattr(config, "quantization_config", None) is not None:
        return  # the shapes of packed weights are checked while they load
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    unlike = {name for name, shape in found.items() if shape != expected.get(name, shape)}
    if unlike:
        name = min(unlike)
        raise UserError(
            f"{len(unlike)} of the {len(found)} weights of {source.name} do not fit its configuration: "
            f"{excerpt(name)} is {excerpt(found[name])}, expected {expected[name]}"
        )


def check_report(source: ModelSource, model: Any, report: dict[str, Any]) -> None:
    """Checks transformers' loading report (``output_loading_info``), and prints which weights were not used.

    Raises:
        UserError: weights are missing or have another shape, or weights of the model's modules were not used.
    """
    state = model.state_dict()
    missing = set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    if missing:
        raise UserError(
            f"{source.name} is incomplete: {len(missing)} of its {len(state)} weights are missing or have another "
            f"shape: {named(missing)}"
        )
    modules = {
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    patterns = {_DIGITS.sub("*", name) for name in state}
    surplus = {key for key in report["unexpected_keys"] if not _OLD_BUFFERS.search(key)}
    unfit = {key for key in surplus if key.rpartition(".")[0] in modules or _DIGITS.sub("*", key) in patterns}
    if unfit:
        raise UserError(
            f"{source.name}: its configuration has no place for {len(unfit)} weights of its files: {named(unfit)}"
        )
    if surplus:
        print(
            f"qlora-ext: {printable(source.name)}: {len(surplus)} weights in its files do not belong to a "
            f"{type(model).__name__} and were ignored: {named(surplus)}",
            file=sys.stderr,
        )


def check_finite(source: ModelSource, model: Any) -> None:
    """Rejects weights with NaN or infinity. Tables of scales may have NaN, but no scale may have its code.

    Raises:
        UserError: a weight has such a value.
    """
    from qlora_ext.nn import layers_of

    tensors = {name: t for name, t in model.state_dict().items() if not name.endswith("scale_table")}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.is_meta and not t.isfinite().all()]
    for name, layer in layers_of(model):
        if layer.form.has_table and layer.residency is None:
            scales = {weight: layer.packed_weight(weight).decoded_scales() for weight in layer.packed_shapes}
            broken += [f"{name}.{weight}" for weight, t in scales.items() if not t.isfinite().all()]
    if broken:
        raise UserError(f"{source.name} is damaged: {len(broken)} weights have NaN or infinity: {named(broken)}")


def check_tokens(model: Any, rows: Iterable[list[int]]) -> None:
    """Rejects token ids without a row in the model's embedding, because the tokenizer belongs to another model.

    Raises:
        UserError: there is such an id.
    """
    known = vocabulary_size(model)
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= known:
        raise UserError(f"the tokenizer has token {largest}, the model has {known} tokens: they do not belong together")


def longest_input(model: Any) -> int | None:
    """How many tokens the model reads at once, by ``max_position_embeddings`` of its configuration; None: no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit
