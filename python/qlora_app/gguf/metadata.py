"""The metadata of a GGUF file about the model itself, written from transformers' configuration.

``qlora_ext.gguf.metadata`` reads them, and knows the families. llama.cpp fixes some choices per architecture, which
``check`` compares with the configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_ext.gguf.metadata import FAMILIES, FLOATS, FULL, ROPE_KEY, SLIDING, scalar_of_27b, table

_TYPES = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32, int: gguf.GGUFValueType.UINT32}
# Parameters of YaRN that llama.cpp does not read in the files of these architectures.
_BETAS = (("beta_fast", 32.0), ("beta_slow", 1.0))


def _ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The RoPE of layers that attend to all tokens, and that of layers with a window if it is another one."""
    rope = config.rope_parameters
    return (rope[FULL], rope[SLIDING]) if FULL in rope else (rope, None)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check(architecture: str, config: Any) -> None:
    """Rejects a configuration of which llama.cpp would compute something else.

    Raises:
        ValueError: it names the field, and what llama.cpp has instead.
    """
    text = config.get_text_config()
    for field, value, expected in _fixed(architecture, text):
        if value != expected:
            raise ValueError(f"{field} is {value!r}, and llama.cpp has {expected!r} in every {architecture} model")
    family, (rope, local) = FAMILIES[architecture], _ropes(text)
    kind = rope.get("rope_type", "default")
    if kind not in family.ropes:
        known = ", ".join(family.ropes)
        raise ValueError(f"the type of RoPE is {kind!r}, and llama.cpp has {known} in {architecture} models")
    if kind == "yarn":
        for field, usual in (*_BETAS, ("attention_factor", 0.1 * math.log(rope["factor"]) + 1.0)):
            value = rope.get(field)
            if value is not None and not math.isclose(value, usual, rel_tol=1e-3):
                raise ValueError(f"{field} of YaRN is {value}, and llama.cpp has {usual:.4g} in {architecture} models")
    if local is not None and local.get("rope_type", "default") != "default":
        raise ValueError("the RoPE of layers with a window is scaled, and llama.cpp does not scale it")


def needs_head(architecture: str) -> bool:
    """Whether a file must have an output head, even if the model ties it to the embeddings."""
    return FAMILIES[architecture].needs_head


def _fixed(architecture: str, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields, their values, and those that llama.cpp assumes."""
    family, layers = FAMILIES[architecture], config.num_hidden_layers

    def get(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    activation = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    yield activation, get(activation), family.activation
    for field in ("attention_bias", "mlp_bias"):
        if not family.biases:
            yield field, bool(get(field)), False
    every = family.full_attention_every
    types = [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    yield "layer_types", get("layer_types") or types, types
    if get("layer_types") is None:
        yield "use_sliding_window", bool(get("use_sliding_window")), False
    yield "use_bidirectional_attention", bool(get("use_bidirectional_attention")), False
    if architecture != "phi3":
        yield "partial_rotary_factor", _ropes(config)[0].get("partial_rotary_factor", 1.0), 1.0
    if family.layers_of_27b is not None:
        sizes = config.hidden_size, config.num_attention_heads, _head_dim(config)
        yield "query_pre_attn_scalar", config.query_pre_attn_scalar, scalar_of_27b(family, layers, *sizes)
        yield "attn_logit_softcapping is None", config.attn_logit_softcapping is None, architecture == "gemma3"
    if architecture == "gemma2":
        yield "final_logit_softcapping is None", config.final_logit_softcapping is None, False
    if architecture == "smollm3":
        rotates = [int((i + 1) % 4 != 0) for i in range(layers)]
        yield "no_rope_layers", [int(bool(layer)) for layer in config.no_rope_layers], rotates
    if architecture == "qwen3moe":
        yield "norm_topk_prob", config.norm_topk_prob, True
        yield "decoder_sparse_step", config.decoder_sparse_step, 1
        yield "mlp_only_layers", list(config.mlp_only_layers or ()), []


def ignored_window(config: Any) -> int | None:
    """The window of attention that llama.cpp does not apply; None if the model has none, or llama.cpp applies it."""
    text = config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None)
    applies = text.model_type in ("mistral", "phi3") and window is not None and window < text.max_position_embeddings
    return window if applies else None


def add_hyperparameters(writer: Any, config: Any) -> None:
    """Adds the metadata of the model to a file, for a configuration that ``check`` accepts."""
    for key, value in _hyperparameters(writer.arch, config.get_text_config()):
        writer.add_key_value(f"{writer.arch}.{key}", value, _TYPES[type(value)])
    rope, _ = _ropes(config.get_text_config())
    if rope.get("rope_type") in ("llama3", "longrope"):
        writer.add_string(ROPE_KEY, json.dumps(rope))


def _hyperparameters(architecture: str, config: Any) -> Iterator[tuple[str, Any]]:
    """The keys without architecture, and the values, whose Python type decides theirs in the file."""
    for key, field in table(FAMILIES[architecture]).items():
        value = getattr(config, field, None)
        if value is not None:
            yield key, float(value) if field in FLOATS else int(value)
    rope, local = _ropes(config)
    head_dim, kind = _head_dim(config), rope.get("rope_type", "default")
    yield "attention.key_length", head_dim
    yield "attention.value_length", head_dim
    yield "rope.dimension_count", int(head_dim * rope.get("partial_rotary_factor", 1.0))
    yield "rope.freq_base", float(rope["rope_theta"])
    if local is not None:
        yield "rope.freq_base_swa", float(local["rope_theta"])
    if architecture == "phi3":
        yield "rope.scaling.original_context_length", _original_length(config, rope)
        if config.sliding_window is None:  # llama.cpp tells Phi-4 by a size of 0
            yield "attention.sliding_window", 0
    if kind == "longrope":
        yield "rope.scaling.attn_factor", float(ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[1])
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield "rope.scaling.original_context_length", _original_length(config, rope)
        yield from ((f"rope.scaling.yarn_{field}", usual) for field, usual in _BETAS)


def _original_length(config: Any, rope: dict[str, Any]) -> int:
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors of the file, float32 by name, that are no weights: factors by which frequencies of RoPE are divided."""
    text = config.get_text_config()
    rope, _ = _ropes(text)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32, device="cpu")
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"))
    size = _head_dim(text)
    unscaled = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
    return {"rope_freqs.weight": (unscaled / scaled.double()).float()}
