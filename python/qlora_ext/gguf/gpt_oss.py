"""gpt-oss in GGUF files, which transformers does not read under the names that llama.cpp gives to its tensors.

The rows of a model's gate_up_proj alternate between gate and up, and the model stores both of its weights transposed.
In the file, ``ffn_gate_exps``, ``ffn_up_exps`` and ``ffn_down_exps`` are stacks of their own, not transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_gguf_pytorch_utils import GGUFTensor, TensorProcessor

ARCHITECTURE = "gpt-oss"
_IN_MODEL = re.compile(r"(?:model\.)?layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?")
_IN_FILE = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.(weight|bias)")
_SINKS = ".attn_sinks"


class Processor(TensorProcessor):  # type: ignore[misc]
    """Turns tensors of the file into weights of the model, as transformers' processors of other architectures do."""

    def perform_fallback_tensor_mapping(
        self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str
    ) -> None:
        if (match := _IN_MODEL.fullmatch(hf_name)) is None:
            return
        layer, stack, is_bias = match.groups()
        for name in stack.split("_"):
            tensor = f"blk.{layer}.ffn_{name}_exps.{'bias' if is_bias else 'weight'}"
            gguf_to_hf_name_map[tensor] = qual_name + hf_name

    def process(self, weights: Any, name: str, **kwargs: Any) -> GGUFTensor:
        if name.endswith(f"{_SINKS}.weight"):
            return GGUFTensor(weights, name.removesuffix(".weight"), {})
        if (match := _IN_FILE.fullmatch(name)) is None:
            return GGUFTensor(weights, name, {})
        stack, kind = match.groups()
        values = weights.swapaxes(-1, -2) if kind == "weight" else weights
        if stack == "down":
            return GGUFTensor(values, name if kind == "bias" else name.removesuffix(".weight"), {})
        target, found = kwargs["tensor_key_mapping"].get(name), kwargs["parsed_parameters"]["tensors"]
        if target is not None:
            values = torch.from_numpy(values)
            if target not in found:
                found[target] = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1]))
            found[target][..., stack == "up" :: 2] = values
        return GGUFTensor(weights, None, {})  # handled


def config_of(metadata: Mapping[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the model's configuration, as the functions of transformers' ``GGUF_CONFIG_ARCHS`` return them."""

    def read(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise ValueError(f"expected {ARCHITECTURE}.{name} in the metadata of the GGUF file")
        return value

    rope = {
        "rope_type": metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "default"),
        "rope_theta": read("rope.freq_base"),
    }
    if rope["rope_type"] == "yarn":
        rope |= {
            "factor": read("rope.scaling.factor"),
            "original_max_position_embeddings": read("rope.scaling.original_context_length"),
            "beta_fast": read("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": read("rope.scaling.yarn_beta_slow", 1.0),
            "truncate": False,
        }
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "max_position_embeddings": read("context_length"),
        "hidden_size": read("embedding_length"),
        "intermediate_size": read("expert_feed_forward_length", metadata.get(f"{ARCHITECTURE}.feed_forward_length")),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": read("attention.head_count"),
        "num_key_value_heads": read("attention.head_count_kv"),
        "head_dim": read("attention.key_length"),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "sliding_window": read("attention.sliding_window"),
        "num_local_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "rope_parameters": rope,
        "vocab_size": metadata["tokenizer.ggml.tokens"],  # their number
        "tie_word_embeddings": "output.weight" not in tensor_names,
        **{f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")},
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
