"""The metadata of a GGUF file about the model itself: its sizes, attention and RoPE, from transformers' configuration.

transformers has a table of llama.cpp's keys for each architecture that it reads. What it does not read is added here,
for both directions. llama.cpp fixes some choices per architecture, which ``check`` compares with the configuration.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..untrusted import FileError, excerpt, parse_json
from .file import ARCHITECTURES

_FULL, _SLIDING = "full_attention", "sliding_attention"
# RoPE whose parameters are in no metadata of llama.cpp, as JSON.
_ROPE_KEY = "qlora_ext.rope_parameters"


@dataclasses.dataclass(frozen=True)
class _Family:
    """What llama.cpp assumes of an architecture.

    Attributes:
        model_type: transformers' name, of which the file is read.
        activation: of the MLP.
        biases: whether linear layers may have biases that the configuration asks for.
        full_attention_every: the distance of two layers that attend to all tokens, if the others have a window.
        ropes: the types of RoPE.
        more: fields of the configuration that transformers' table lacks, by llama.cpp's keys.
        layers_of_27b: the number of layers with which llama.cpp scales attention by the hidden size per head.
        needs_head: whether llama.cpp loads no file without an output head, not even if it is tied to the embeddings.
    """

    model_type: str
    activation: str = "silu"
    biases: bool = False
    full_attention_every: int = 1
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers_of_27b: int | None = None
    needs_head: bool = False


_HEAD = {"attention.key_length": "head_dim"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_FINAL_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", **_FINAL_CAP}
_EXPERTS = {"expert_feed_forward_length": "moe_intermediate_size"}
_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_LLAMA = ("default", "linear", "yarn", "llama3")
_GELU = "gelu_pytorch_tanh"
_FAMILIES = {
    "llama": _Family("llama", biases=True, ropes=_LLAMA, more=_HEAD),
    "granite": _Family("granite", biases=True, ropes=_LLAMA, more=_SCALES),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3", more=_HEAD),
    "qwen3moe": _Family("qwen3_moe", more={**_HEAD, **_EXPERTS}),
    "gemma2": _Family("gemma2", _GELU, full_attention_every=2, more={**_WINDOW, **_CAPS}, layers_of_27b=46),
    "gemma3": _Family("gemma3_text", _GELU, full_attention_every=6, more={**_WINDOW, **_FINAL_CAP}, layers_of_27b=62),
    "phi3": _Family("phi3", ropes=("default", "longrope"), more=_WINDOW),
    "smollm3": _Family("smollm3"),
    "olmo2": _Family("olmo2", needs_head=True),
    "gpt-oss": _Family(
        "gpt_oss",
        biases=True,
        full_attention_every=2,
        more={**_HEAD, **_WINDOW, "expert_feed_forward_length": "intermediate_size"},
        needs_head=True,
    ),
}
# Parameters of YaRN that llama.cpp does not read in the files of these architectures.
_BETAS = (("beta_fast", 32.0), ("beta_slow", 1.0))
# Keys of transformers' table that llama.cpp does not have.
_UNKNOWN = ("sliding_window",)
_FLOATS = ("rms_norm_eps", *_SCALES.values(), *_CAPS.values())


def _table(family: _Family) -> dict[str, str]:
    """transformers' names of fields by llama.cpp's keys, without RoPE's."""
    table = GGUF_CONFIG_MAPPING.get(family.model_type.removesuffix("_text"), GGUF_CONFIG_MAPPING["llama"])
    known = {key: field for key, field in table.items() if field is not None and key not in _UNKNOWN}
    return {key: field for key, field in {**known, **family.more}.items() if not key.startswith("rope.")}


def _ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The RoPE of layers that attend to all tokens, and that of layers with a window if it is another one."""
    rope = config.rope_parameters
    return (rope[_FULL], rope[_SLIDING]) if _FULL in rope else (rope, None)


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
    family, (rope, local) = _FAMILIES[architecture], _ropes(text)
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
    return _FAMILIES[architecture].needs_head


def _scalar_of_27b(family: _Family, layers: int, hidden_size: int, heads: int, head_dim: int) -> int:
    """What llama.cpp takes for ``query_pre_attn_scalar``."""
    return hidden_size // heads if layers == family.layers_of_27b else head_dim


def _fixed(architecture: str, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields, their values, and those that llama.cpp assumes."""
    family, layers = _FAMILIES[architecture], config.num_hidden_layers

    def get(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    activation = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    yield activation, get(activation), family.activation
    for field in ("attention_bias", "mlp_bias"):
        if not family.biases:
            yield field, bool(get(field)), False
    every = family.full_attention_every
    types = [_FULL if (i + 1) % every == 0 else _SLIDING for i in range(layers)]
    yield "layer_types", get("layer_types") or types, types
    if get("layer_types") is None:
        yield "use_sliding_window", bool(get("use_sliding_window")), False
    yield "use_bidirectional_attention", bool(get("use_bidirectional_attention")), False
    if architecture != "phi3":
        yield "partial_rotary_factor", _ropes(config)[0].get("partial_rotary_factor", 1.0), 1.0
    if family.layers_of_27b is not None:
        sizes = config.hidden_size, config.num_attention_heads, _head_dim(config)
        yield "query_pre_attn_scalar", config.query_pre_attn_scalar, _scalar_of_27b(family, layers, *sizes)
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
        key = f"{writer.arch}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    rope, _ = _ropes(config.get_text_config())
    if rope.get("rope_type") in ("llama3", "longrope"):
        writer.add_string(_ROPE_KEY, json.dumps(rope))


def _hyperparameters(architecture: str, config: Any) -> Iterator[tuple[str, Any]]:
    """The keys without architecture, and the values, whose Python type decides theirs in the file."""
    for key, field in _table(_FAMILIES[architecture]).items():
        value = getattr(config, field, None)
        if value is not None:
            yield key, float(value) if field in _FLOATS else int(value)
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


def config_of(metadata: Mapping[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the model's configuration, as the functions of transformers' ``GGUF_CONFIG_ARCHS`` return them.

    They are those of transformers' own reader, and what it leaves at the defaults of the class.

    Raises:
        FileError: the metadata are damaged.
    """
    architecture = metadata["general.architecture"]
    family = _FAMILIES[architecture]
    own = {key: metadata.get(f"{architecture}.{key}") for key in _table(family)}
    config: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(family.model_type, {}))
    config |= {field: own[key] for key, field in _table(family).items() if own[key] is not None}
    config |= {
        field: metadata[f"tokenizer.{key}"]
        for key, field in GGUF_CONFIG_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in metadata
    }
    config |= {"model_type": family.model_type, "tie_word_embeddings": "output.weight" not in tensor_names}
    config.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))  # their number
    if family.biases:
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in tensor_names,
            "mlp_bias": "blk.0.ffn_up.bias" in tensor_names,
        }
    if family.layers_of_27b is not None and "head_dim" in config:
        sizes = (
            config.get(field, 0) for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
        )
        config["query_pre_attn_scalar"] = _scalar_of_27b(family, *sizes)
    if architecture == "llama" and "head_dim" not in config and f"{architecture}.rope.dimension_count" in metadata:
        config["head_dim"] = metadata[f"{architecture}.rope.dimension_count"]
    if "sliding_window" in config:
        config["sliding_window"] = config["sliding_window"] or None
    length = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    if architecture == "phi3" and length is not None:
        config["original_max_position_embeddings"] = length
    return config | _rope_of(architecture, metadata, config)


def _rope_of(architecture: str, metadata: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the configuration about RoPE."""

    def read(key: str) -> Any:
        return metadata.get(f"{architecture}.rope.{key}")

    if _ROPE_KEY in metadata:
        return {"rope_parameters": _checked_rope(metadata[_ROPE_KEY])}
    if read("freq_base") is None:
        return {}
    rope = {"rope_type": "default", "rope_theta": read("freq_base")}
    kind, factor = read("scaling.type"), read("scaling.factor")
    if kind in ("linear", "yarn") and factor:
        rope |= {"rope_type": kind, "factor": factor}
    length = read("scaling.original_context_length")
    if rope["rope_type"] == "yarn" and length:
        rope["original_max_position_embeddings"] = length
    if architecture == "phi3" and config.get("hidden_size") and config.get("num_attention_heads"):
        head = config["hidden_size"] // config["num_attention_heads"]
        rope["partial_rotary_factor"] = (read("dimension_count") or head) / head
    if architecture != "gemma3":
        return {"rope_parameters": rope}
    local = {"rope_type": "default", "rope_theta": read("freq_base_swa") or 10000.0}
    return {"rope_parameters": {_FULL: rope, _SLIDING: local}}


def _checked_rope(text: Any) -> dict[str, Any]:
    """RoPE's parameters as ``add_hyperparameters`` writes them, from an untrusted file."""
    rope: dict[str, Any] = parse_json(str(text), f"{_ROPE_KEY} is damaged", dict)
    numbers = [v for value in rope.values() for v in (value if isinstance(value, list) else [value])]
    if any(not isinstance(v, (int, float)) for v in numbers if v != rope.get("rope_type")):
        raise FileError(f"{_ROPE_KEY}: expected numbers, got {excerpt(text)}")
    return rope


# llama.cpp's architectures that ``config_of`` reads.
READ = tuple(dict.fromkeys(name for name in ARCHITECTURES.values() if name != "gpt-oss"))
