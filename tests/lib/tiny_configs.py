"""Tiny configurations of the families of the installed transformers, shrunk by rules on the names of their fields."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, HIDDEN, HEADS, LAYERS, IMAGE = 128, 64, 4, 2, 32

# Rules for the values of fields by their names. The first match applies. A callable takes the default of the field and
# all fields.
_RULES: list[tuple[str, Any]] = [
    (r"(image|video|audio|img|speech|boi|eoi|vision|visual|boa|eoa)\w*_(token_id|token_index|id|index)$", None),
    (r"\w*vocab_size\w*|num_embeddings|vocabulary_size|n_token", VOCABULARY),
    (
        r"(num_)?(hidden_|encoder_|decoder_|n_|text_|vision_)*layers?$|n_layers?|depth|num_(hidden|encoder|decoder)_layers"
        r"|num_blocks|encoder_layers|decoder_layers|num_layers",
        LAYERS,
    ),
    (r"(num_)?\w*key_value_heads|n_kv_heads?|num_kv_heads|multi_query_group_num|num_key_value_groups", "kv"),
    (r"(num_|n_|encoder_|decoder_)\w*attention_heads|n_heads?|num_heads|num_attention_heads|heads|nhead", HEADS),
    (
        r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|hidden_dim|projection_dim|proj_dim|emb_dim|model_dim"
        r"|attention_hidden_size|word_embed_proj_dim|out_hidden_size|output_dim|lm_hidden_size|text_dim)$",
        HIDDEN,
    ),
    (r"(\w*head_dim|kv_channels|d_kv)$", HIDDEN // HEADS),
    (
        r"(\w*intermediate_size\w*|d_ff|ffn_dim|n_inner|\w*ffn_dim|ffn_hidden_size|mlp_dim|ff_dim|inner_dim|dim_feedforward"
        r"|feed_forward\w*_dim)$",
        96,
    ),
    (r"(num_|n_)\w*(local|routed)?_?experts$|n_routed_experts|num_local_experts|num_experts", 4),
    (r"(num_)?\w*experts_per_tok\w*|moe_topk?|moe_top_k|top_k_experts|experts_per_token|num_selected_experts", 2),
    (
        r"max_position_embeddings|n_positions|max_sequence_length|seq_len|max_target_positions|max_source_positions"
        r"|n_ctx|max_seq_len|max_seq_length|position_embedding_size|block_size_max",
        256,
    ),
    (r"sliding_window\w*|window_size_text|attention_window_size|local_attention_window", 16),
    (r"image_size|input_size|img_size", IMAGE),
    (r"q_lora_rank|kv_lora_rank|lora_rank|time_mix_extra_dim|low_rank_dim", 16),
    (r"n_group", 2),
    (r"(mamba_)?chunk_size", 8),
    (r"topk_group", 1),
    (r"rotary_dim", 8),
    (r"index_n_heads|index_topk", 4),
    (r"(bos|eos|pad|cls|sep|mask|unk|decoder_start|forced_bos|forced_eos)_token_id", "token"),
]
_TOKENS = {"bos": 1, "pad": 0, "cls": 1, "mask": 3, "unk": 3, "decoder_start": 1, "forced_bos": None}


def _by_rule(name: str, value: Any, fields: dict[str, Any]) -> Any:
    """The small value of the field ``name`` of a configuration."""
    if isinstance(value, dict) and "mrope_section" in value:
        half = int(HIDDEN // HEADS * value.get("partial_rotary_factor", 1)) // 2
        return {**value, "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]}
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, small in _RULES:
        if not re.fullmatch(pattern, name):
            continue
        if small == "kv":
            heads = next((v for k, v in fields.items() if re.fullmatch(r"num_attention_heads|n_heads?", k)), None)
            return HEADS if value == heads else min(value, 2)
        if small == "token":
            return _TOKENS.get(name.removesuffix("_token_id"), 2)
        return value if small is None else min(value, small)
    return value


def _layers(fields: dict[str, Any]) -> tuple[int, list[int]]:
    """The number of layers, and the indices of the ones to keep: two, or one of each type."""
    count = next((v for k, v in fields.items() if k in ("num_hidden_layers", "n_layer", "num_layers")), 0) or 0
    types = fields.get("layer_types") or fields.get("layers_block_type") or []
    indices = [types.index(t) for t in dict.fromkeys(types)] if len(types) == count else []
    indices += [i for i in range(count) if i not in indices][: max(0, LAYERS - len(indices))]
    return count, sorted(indices)


def shrunk(config: Any, changes: dict[str, Any]) -> Any:
    """A small configuration of the same class with ``changes``, which name inner configurations by their keys."""
    usual, fields = type(config)().to_dict(), config.to_dict()
    count, indices = _layers(fields)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        inner = vars(config).get(name)
        if isinstance(inner, transformers.PreTrainedConfig):
            small[name] = shrunk(inner, changes.get(name, {}))
        elif name in changes:
            small[name] = changes[name]
        elif isinstance(value, list) and count and len(value) == count:
            small[name] = [value[i] for i in indices]
        elif name in ("num_hidden_layers", "n_layer", "num_layers") and len(indices) > LAYERS:
            small[name] = len(indices)
        else:
            new = _by_rule(name, value, fields)
            if new != usual.get(name):
                small[name] = new
    small |= {name: value for name, value in changes.items() if name not in fields}
    for name in ("model_type", "transformers_version", "architectures", "dtype", "per_layer_config"):
        if name not in changes:
            small.pop(name, None)
    return type(config)(**small)


# Changes for families that the rules do not handle.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 96, "ffn_hidden_size": 96, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
}


def config_of(model_type: str) -> Any:
    """A tiny configuration of the family ``model_type``."""
    return shrunk(CONFIG_MAPPING[model_type](), copy.deepcopy(_CHANGES.get(model_type, {})))


def inputs_of(model: Any, family: str, kind: str) -> dict[str, Tensor]:
    """The arguments for calling a tiny ``model``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 100, (2, 12), generator=generator)
    config = model.config
    main = getattr(model, "main_input_name", "input_ids")
    given: dict[str, Tensor] = {}
    if main == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        size = getattr(config, "image_size", IMAGE)
        size = size if isinstance(size, int) else IMAGE
        channels = channels if isinstance(channels, int) else 3
        given["pixel_values"] = torch.randn(2, channels, size, size, generator=generator)
    elif main == "input_values":
        given["input_values"] = torch.randn(2, 4000, generator=generator)
    elif main == "input_features":
        length = 2 * config.max_source_positions if family == "whisper" else 64  # Whisper supports only one length
        given["input_features"] = torch.randn(2, getattr(config, "num_mel_bins", 80), length, generator=generator)
    else:
        given["input_ids"] = ids
    if kind == "vision-language":
        given["input_ids"] = ids
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids[:, :6]
    return given
