"""The target ``gguf-adapter``: LoRA on linear layers, for llama.cpp and Ollama."""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...gguf.file import ARCHITECTURES, read_header
from ..errors import UserError, first_line, reading
from ..models import validate_model
from ..models.adapter_files import base_of, check_files, config_of, find
from ..models.pretrained import load_config
from ..models.sources import ModelSource
from .job import Job, check_tied

if TYPE_CHECKING:
    import torch

    from ...gguf.adapter import Place

_TARGET = "--to gguf-adapter"
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_HEADER = 1 << 16  # bytes
# Settings of PEFT with which an adapter is more than B · A, and what they are called.
_MORE = {
    "use_dora": "DoRA",
    "modules_to_save": "modules saved in full (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "lora_bias": "biases (lora_bias)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_qalora": "QA-LoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
}
# Those that no merged model has either.
_CONDITIONAL = {"alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow"}


def _check_config(adapter: pathlib.Path) -> None:
    """Rejects an adapter that is not plain LoRA.

    Raises:
        UserError: it is of another kind, which the message names.
    """
    config = config_of(adapter)
    kind = config.get("peft_type")
    found = [words for name, words in _MORE.items() if config.get(name)]
    if kind != "LORA" or found:
        has = found[0] if found else kind
        raise UserError(f"{_TARGET}: the adapter {adapter} has {has}, which that format cannot hold; use --to dense")
    conditional = [words for name, words in _CONDITIONAL.items() if config.get(name)]
    if conditional:
        raise UserError(f"{_TARGET}: the adapter {adapter} is {conditional[0]}, which only PEFT runs")


def architecture_of(source: ModelSource, config: Any) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        UserError: it is not one of those for which files are written.
    """
    if source.gguf_file is not None:
        found = read_header(pathlib.Path(source.path) / source.gguf_file).architecture
        if found in ARCHITECTURES.values():
            return found
    else:
        found = config.model_type
        if found in ARCHITECTURES:
            return ARCHITECTURES[found]
    raise UserError(
        f"{_TARGET}: {source.name} is a {found} model, expected one of {', '.join(ARCHITECTURES)}; use --to dense, and "
        "the converter of llama.cpp"
    )


def _layers(adapter: pathlib.Path, model: Any) -> dict[str, int]:
    """The layers with an adapter, and their ranks.

    Raises:
        UserError: the adapter has other weights than pairs of A and B, or their shapes do not fit ``model``.
    """
    found = validate_model.shapes(adapter / "adapter_model.safetensors")
    matches = {name: _MATRIX.fullmatch(name) for name in found}
    others = [name for name, match in matches.items() if match is None or match[1].endswith(".base_layer")]
    others += [name for name, match in matches.items() if match and match[1].endswith(".experts")]
    if others:
        raise UserError(
            f"{_TARGET}: the adapter {adapter} has weights other than those of LoRA on linear layers, which that "
            f"format cannot hold: {validate_model.named(others)}; use --to dense"
        )
    state, ranks = model.state_dict(), {}
    for layer in {match[1]: None for match in matches.values() if match}:
        a, b = (found.get(f"base_model.model.{layer}.lora_{side}.weight", []) for side in "AB")
        weight = state.get(f"{layer}.weight")
        expected = [] if weight is None else list(weight.shape)
        if len(a) != 2 or len(b) != 2 or [b[0], a[1]] != expected or a[0] != b[1]:
            raise UserError(f"the adapter {adapter} does not fit its base: {layer} has A {a} and B {b} on {expected}")
        ranks[layer] = a[0]
    return ranks


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
    _check_config(adapter)
    source = base_of(adapter, arguments.model, arguments.trust_remote_code)
    base_config = load_config(source)
    architecture = architecture_of(source, base_config)
    model = validate_model.skeleton(source, base_config)
    check_tied(_TARGET, adapter, model)
    ranks = _layers(adapter, model)
    try:
        alpha, factors = fold(_scalings(ranks, adapter))
        found = places(architecture, model, ranks)
    except ValueError as error:
        raise UserError(f"{_TARGET}: {first_line(error)}; use --to dense") from error
    kept = dtype_named(dtype)
    state = model.state_dict()
    count = sum(rank * sum(state[f"{layer}.weight"].shape) for layer, rank in ranks.items())
    layers = {layer: (place, factors[layer]) for layer, place in found.items()}
    return Job(count * kept.itemsize + _HEADER, functools.partial(_build, adapter, architecture, alpha, layers, kept))


def _build(
    adapter: pathlib.Path, architecture: str, alpha: float, layers: dict[str, tuple[Place, float]], dtype: torch.dtype
) -> Callable[[pathlib.Path], None]:
    from safetensors.torch import load_file

    from ...gguf.adapter import write_adapter

    with reading("weights", str(adapter)):
        weights = load_file(adapter / "adapter_model.safetensors")
    matrices = {}
    for layer, (place, factor) in layers.items():
        a, b = (weights[f"base_model.model.{layer}.lora_{side}.weight"].float() for side in "AB")
        a, b = a.to(dtype), (b[place.rows] * factor).to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(
                f"{_TARGET}: the adapter of {layer} has NaN, infinity or a value that {dtype} cannot hold; try "
                "--to gguf-adapter, which writes float32"
            )
        matrices[place.tensor] = a, b
    return lambda path: write_adapter(path, architecture, alpha, matrices)
