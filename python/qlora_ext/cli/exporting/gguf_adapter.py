"""The target ``gguf-adapter``: LoRA on linear layers, for llama.cpp and Ollama."""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import UserError, first_line, reading
from ..models import validate_model
from ..models.adapter_files import base_of, check_files, find
from ..models.pretrained import load_config
from .job import Job
from .lora import architecture_of, check_plain, check_tied, ranks_of
from .read_adapter import read_adapter

if TYPE_CHECKING:
    import torch

    from ...gguf.adapter import Place

_TARGET = "--to gguf-adapter"
_HEADER = 1 << 16  # bytes


def _scalings(ranks: dict[str, int], adapter: pathlib.Path) -> dict[str, tuple[float, int]]:
    """The factor of B · A, and the rank, of each layer."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    with reading("configuration", str(adapter)):
        lora = LoraConfig.from_pretrained(str(adapter))
        found = {}
        for layer, rank in ranks.items():
            alpha = float(lora.alpha_pattern.get(get_pattern_key([*lora.alpha_pattern], layer), lora.lora_alpha))
            found[layer] = alpha / (math.sqrt(rank) if lora.use_rslora else rank), rank
    return found


def prepare(arguments: argparse.Namespace, dtype: str) -> Job:
    """The adapter, as float32 or float16."""
    from ..._internal.dtype_names import dtype_named
    from ...gguf.adapter import fold, places

    if arguments.adapter is None:
        raise UserError(f"{_TARGET}: expected an adapter (--adapter), got a model; use --to dense")
    adapter = find(arguments.adapter)
    check_files(adapter)
    check_plain(_TARGET, adapter)
    source = base_of(adapter, arguments.model, arguments.trust_remote_code)
    base_config = load_config(source)
    architecture = architecture_of(_TARGET, source, base_config)
    model = validate_model.skeleton(source, base_config)
    check_tied(_TARGET, adapter, model)
    ranks = ranks_of(_TARGET, adapter, model)
    try:
        scalings = _scalings(ranks, adapter)
        alpha, factors = fold(scalings)
        found = places(architecture, model, ranks)
    except ValueError as error:
        raise UserError(f"{_TARGET}: {first_line(error)}; use --to dense") from error
    kept = dtype_named(dtype)
    state = model.state_dict()
    count = sum(rank * sum(state[f"{layer}.weight"].shape) for layer, rank in ranks.items())
    layers = {layer: (place, factors[layer]) for layer, place in found.items()}
    return Job(
        count * kept.itemsize + _HEADER,
        functools.partial(_build, adapter, architecture, alpha, layers, kept),
        functools.partial(
            read_adapter,
            functools.partial(_trained, adapter, found),
            {layer: [place] for layer, place in found.items()},
            scalings,
        ),
    )


def _trained(adapter: pathlib.Path, layers: Iterable[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer, float32."""
    from safetensors.torch import load_file

    with reading("weights", str(adapter)):
        weights = load_file(adapter / "adapter_model.safetensors")
    names = {layer: f"base_model.model.{layer}.lora_" for layer in layers}
    return {layer: (weights[f"{n}A.weight"].float(), weights[f"{n}B.weight"].float()) for layer, n in names.items()}


def _build(
    adapter: pathlib.Path, architecture: str, alpha: float, layers: dict[str, tuple[Place, float]], dtype: torch.dtype
) -> Callable[[pathlib.Path], None]:
    from ...gguf.adapter import write_adapter

    trained, matrices = _trained(adapter, layers), {}
    for layer, (place, factor) in layers.items():
        a, b = trained[layer]
        a, b = a.to(dtype), (b[place.rows] * factor).to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(
                f"{_TARGET}: the adapter of {layer} has NaN, infinity or a value that {dtype} cannot hold; try "
                "--to gguf-adapter, which writes float32"
            )
        matrices[place.tensor] = a, b
    return lambda path: write_adapter(path, architecture, alpha, matrices)
