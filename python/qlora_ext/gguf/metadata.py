"""The metadata of a GGUF file about the model itself: its sizes, attention and RoPE, as transformers' configuration.

transformers has a table of llama.cpp's keys for each architecture that it reads. What it does not read is added here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

from ..untrusted import FileError, excerpt, parse_json
from .file import ARCHITECTURES

FULL, SLIDING = "full_attention", "sliding_attention"
# RoPE whose parameters are in no metadata of llama.cpp, as JSON.
ROPE_KEY = "qlora_ext.rope_parameters"


@dataclasses.dataclass(frozen=True)
class Family:
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
FAMILIES = {
    "llama": Family("llama", biases=True, ropes=_LLAMA, more=_HEAD),
    "granite": Family("granite", biases=True, ropes=_LLAMA, more=_SCALES),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", more=_HEAD),
    "qwen3moe": Family("qwen3_moe", more={**_HEAD, **_EXPERTS}),
    "gemma2": Family("gemma2", _GELU, full_attention_every=2, more={**_WINDOW, **_CAPS}, layers_of_27b=46),
    "gemma3": Family("gemma3_text", _GELU, full_attention_every=6, more={**_WINDOW, **_FINAL_CAP}, layers_of_27b=62),
    "phi3": Family("phi3", ropes=("default", "longrope"), more=_WINDOW),
    "smollm3": Family("smollm3"),
    "olmo2": Family("olmo2", needs_head=True),
    "gpt-oss": Family(
        "gpt_oss",
        biases=True,
        full_attention_every=2,
        more={**_HEAD, **_WINDOW, "expert_feed_forward_length": "intermediate_size"},
        needs_head=True,
    ),
}
# Keys of transformers' table that llama.cpp does not have.
_UNKNOWN = ("sliding_window",)
# Fields that are float32 in a file.
FLOATS = ("rms_norm_eps", *_SCALES.values(), *_CAPS.values())


def table(family: Family) -> dict[str, str]:
    """transformers' names of fields by llama.cpp's keys, without RoPE's."""
    table = GGUF_CONFIG_MAPPING.get(family.model_type.removesuffix("_text"), GGUF_CONFIG_MAPPING["llama"])
    known = {key: field for key, field in table.items() if field is not None and key not in _UNKNOWN}
    return {key: field for key, field in {**known, **family.more}.items() if not key.startswith("rope.")}


def scalar_of_27b(family: Family, layers: int, hidden_size: int, heads: int, head_dim: int) -> int:
    """What llama.cpp takes for ``query_pre_attn_scalar``."""
    return hidden_size // heads if layers == family.layers_of_27b else head_dim


def config_of(metadata: Mapping[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the model's configuration, as the functions of transformers' ``GGUF_CONFIG_ARCHS`` return them.

    They are those of transformers' own reader, and what it leaves at the defaults of the class.

    Raises:
        FileError: the metadata are damaged.
    """
    architecture = metadata["general.architecture"]
    family = FAMILIES[architecture]
    own = {key: metadata.get(f"{architecture}.{key}") for key in table(family)}
    config: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(family.model_type, {}))
    config |= {field: own[key] for key, field in table(family).items() if own[key] is not None}
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
        config["query_pre_attn_scalar"] = scalar_of_27b(family, *sizes)
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

    if ROPE_KEY in metadata:
        return {"rope_parameters": _checked_rope(metadata[ROPE_KEY])}
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
    return {"rope_parameters": {FULL: rope, SLIDING: local}}


def _checked_rope(text: Any) -> dict[str, Any]:
    """The RoPE parameters in JSON from an untrusted file."""
    rope: dict[str, Any] = parse_json(str(text), f"{ROPE_KEY} is damaged", dict)
    numbers = [v for value in rope.values() for v in (value if isinstance(value, list) else [value])]
    if any(not isinstance(v, (int, float)) for v in numbers if v != rope.get("rope_type")):
        raise FileError(f"{ROPE_KEY}: expected numbers, got {excerpt(text)}")
    return rope


# llama.cpp's architectures that ``config_of`` reads.
READ = tuple(dict.fromkeys(name for name in ARCHITECTURES.values() if name != "gpt-oss"))
