"""The metadata of a GGUF file about the model itself: its sizes, attention and RoPE, from transformers' configuration.

transformers has a table of llama.cpp's keys for each architecture that it reads. What it does not read, or reads with
defaults, is added here. llama.cpp fixes some choices per architecture, which ``check`` compares with the configuration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_KEYS = gguf.Keys
_FLOATS = ("rope_theta", "rms_norm_eps")
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class _Family:
    """What llama.cpp assumes of an architecture.

    Attributes:
        activation: of the MLP.
        biases: whether linear layers may have biases that the configuration asks for.
        full_attention_every: the distance of two layers that attend to all tokens, if the others have a window.
        ropes: kinds of RoPE.
    """

    activation: str = "silu"
    biases: bool = False
    full_attention_every: int = 1
    ropes: tuple[str, ...] = ("default", "linear", "yarn")


_LLAMA = _Family(biases=True, ropes=("default", "linear", "yarn", "llama3"))
_FAMILIES = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "phi3": _Family(ropes=("default", "longrope")),
    "gemma2": _Family("gelu_pytorch_tanh", full_attention_every=2),
    "gemma3": _Family("gelu_pytorch_tanh", full_attention_every=6),
    "gpt-oss": _Family(biases=True, full_attention_every=2),
}
# Layers of the Gemma models in which llama.cpp scales attention by hidden size per head instead of the size of a head.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def _ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The RoPE of layers that attend to all tokens, and that of layers with a window if it is another one."""
    rope = config.rope_parameters
    return (rope[_FULL], rope[_SLIDING]) if _FULL in rope else (rope, None)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check(architecture: str, config: Any) -> None:
    """Rejects a configuration of which llama.cpp would compute something else.

    Raises:
        ValueError: it names the field, and what llama.cpp has instead.
    """
    text = config.get_text_config()
    for field, value, expected in _fixed(architecture, text):
        if value != expected:
            raise ValueError(f"{field} is {value!r}, and llama.cpp has {expected!r} in every {architecture} model")
    family, (rope, local) = _FAMILIES.get(architecture, _Family()), _ropes(text)
    kind = rope.get("rope_type", "default")
    if kind not in family.ropes:
        raise ValueError(
            f"the RoPE type is {kind!r}, and llama.cpp has {', '.join(family.ropes)} in {architecture} models"
        )
    if kind == "yarn" and rope.get("attention_factor") is not None:
        usual = 0.1 * math.log(rope["factor"]) + 1.0
        if not math.isclose(rope["attention_factor"], usual, rel_tol=1e-3):
            raise ValueError(f"YaRN's attention_factor is {rope['attention_factor']}, and llama.cpp has {usual:.4f}")
    if local is not None and local.get("rope_type", "default") != "default":
        raise ValueError("the RoPE of layers with a window is scaled, and llama.cpp does not scale it")


def _fixed(architecture: str, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields, their values, and those that llama.cpp assumes."""
    family, layers = _FAMILIES.get(architecture, _Family()), range(config.num_hidden_layers)

    def get(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    activation = "hidden_activation" if architecture.startswith("gemma") else "hidden_act"
    yield activation, get(activation), family.activation
    for field in ("attention_bias", "mlp_bias"):
        if not family.biases:
            yield field, bool(get(field)), False
    every = family.full_attention_every
    types = [_FULL if (i + 1) % every == 0 else _SLIDING for i in layers]
    yield "layer_types", get("layer_types") or types, types
    if every == 1 and get("layer_types") is None:
        yield "use_sliding_window", get("use_sliding_window", False), False
    yield "use_bidirectional_attention", bool(get("use_bidirectional_attention")), False
    if architecture != "phi3":
        yield "partial_rotary_factor", _ropes(config)[0].get("partial_rotary_factor", 1.0), 1.0
    if architecture in _LAYERS_OF_27B:
        head = _head_dim(config)
        if config.num_hidden_layers == _LAYERS_OF_27B[architecture]:
            head = config.hidden_size // config.num_attention_heads
        yield "query_pre_attn_scalar", config.query_pre_attn_scalar, head
        yield "attn_logit_softcapping is None", config.attn_logit_softcapping is None, architecture == "gemma3"
    if architecture == "gemma2":
        yield "final_logit_softcapping is None", config.final_logit_softcapping is None, False
    if architecture == "smollm3":
        rotated = [int((i + 1) % 4 != 0) for i in layers]
        yield "no_rope_layers", [int(bool(rotates)) for rotates in config.no_rope_layers], rotated
    if architecture == "qwen3moe":
        yield "norm_topk_prob", config.norm_topk_prob, True
        yield "decoder_sparse_step", config.decoder_sparse_step, 1
        yield "mlp_only_layers", list(config.mlp_only_layers or ()), []


def add_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:
    """Adds the metadata of the model to a file, for a configuration that ``check`` accepts."""
    architecture, text = writer.arch, config.get_text_config()
    for key, value in _hyperparameters(architecture, text):
        key = key.format(arch=architecture)
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def _hyperparameters(architecture: str, config: Any) -> Iterator[tuple[str, Any]]:
    """The keys, with a place for the architecture, and the values, whose Python type decides theirs in the file."""
    rope, local = _ropes(config)
    from_table = _table(architecture, config.model_type)
    for key, field in from_table.items():
        value = rope["rope_theta"] if field == "rope_theta" else getattr(config, field, None)
        if value is not None:
            yield f"{{arch}}.{key}", float(value) if field in _FLOATS else int(value)
    head_dim = _head_dim(config)
    yield _KEYS.Attention.KEY_LENGTH, head_dim
    yield _KEYS.Attention.VALUE_LENGTH, head_dim
    yield _KEYS.Rope.DIMENSION_COUNT, int(head_dim * rope.get("partial_rotary_factor", 1.0))
    for key, field, kind in _MORE:
        value = getattr(config, field, None)
        if value is not None and architecture in _ONLY_IN.get(key, (architecture,)):
            yield key, kind(value)
    if architecture == "phi3":  # llama.cpp tells Phi-4, which has no window, by a size of 0
        yield _KEYS.Attention.SLIDING_WINDOW, config.sliding_window or 0
    if architecture == "gpt-oss":
        yield _KEYS.LLM.EXPERT_FEED_FORWARD_LENGTH, config.intermediate_size
    if local is not None:
        yield _KEYS.Rope.FREQ_BASE_SWA, float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        yield _KEYS.Rope.SCALING_TYPE, kind
        yield _KEYS.Rope.SCALING_FACTOR, float(rope["factor"])
    if kind == "yarn":
        yield _KEYS.Rope.SCALING_ORIG_CTX_LEN, _original_length(config, rope)
        for key, field in (
            (_KEYS.Rope.SCALING_YARN_BETA_FAST, "beta_fast"),
            (_KEYS.Rope.SCALING_YARN_BETA_SLOW, "beta_slow"),
        ):
            if rope.get(field) is not None:
                yield key, float(rope[field])
    if architecture == "phi3":
        yield _KEYS.Rope.SCALING_ORIG_CTX_LEN, _original_length(config, rope)
    if kind == "longrope":
        _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        yield _KEYS.Rope.SCALING_ATTN_FACTOR, float(factor)


_WINDOWED = ("gemma2", "gemma3", "gpt-oss")
_MORE: tuple[tuple[str, str, type], ...] = (
    (_KEYS.Attention.SLIDING_WINDOW, "sliding_window", int),
    (_KEYS.Attention.SCALE, "attention_multiplier", float),
    (_KEYS.LLM.ATTN_LOGIT_SOFTCAPPING, "attn_logit_softcapping", float),
    (_KEYS.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping", float),
    (_KEYS.LLM.EMBEDDING_SCALE, "embedding_multiplier", float),
    (_KEYS.LLM.RESIDUAL_SCALE, "residual_multiplier", float),
    (_KEYS.LLM.LOGIT_SCALE, "logits_scaling", float),
    (_KEYS.LLM.EXPERT_FEED_FORWARD_LENGTH, "moe_intermediate_size", int),
)
_ONLY_IN = {_KEYS.Attention.SLIDING_WINDOW: _WINDOWED}


def _table(architecture: str, model_type: str) -> dict[str, str]:
    """transformers' names of fields by llama.cpp's keys."""
    usual = GGUF_CONFIG_MAPPING["llama"]
    table = GGUF_CONFIG_MAPPING.get(model_type.removesuffix("_text"), usual)
    known = {
        value for part in (_KEYS.LLM, _KEYS.Attention, _KEYS.Rope) for value in vars(part).values()
    }  # transformers' table has others too
    return {key: field for key, field in table.items() if field is not None and f"{{arch}}.{key}" in known}


def _original_length(config: Any, rope: dict[str, Any]) -> int:
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)


def rope_tensors(architecture: str, config: Any) -> dict[str, Tensor]:
    """Tensors of the file, float32 by name, that are no weights: factors by which frequencies of RoPE are divided."""
    text = config.get_text_config()
    rope, _ = _ropes(text)
    kind = rope.get("rope_type", "default")
    names = gguf.TENSOR_NAMES
    if kind == "longrope":
        both = {
            gguf.MODEL_TENSOR.ROPE_FACTORS_LONG: rope["long_factor"],
            gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT: rope["short_factor"],
        }
        return {f"{names[key]}.weight": torch.tensor(value, dtype=torch.float32) for key, value in both.items()}
    if kind != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
    size = _head_dim(text)
    unscaled = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
    return {f"{names[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight": (unscaled / scaled.double()).float()}
