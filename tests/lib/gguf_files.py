"""GGUF files of tiny models."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_ext.gguf import blocks
from tiny_models import SIZES, make

# Sizes of which every matrix has whole blocks of every type.
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 512}

SHORT = {
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.": "ffn_gate_inp.",
}


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Random blocks [blocks, bytes per block] of a 4-bit type whose scales are finite."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.random.default_rng(seed).integers(0, 256, (math.prod(shape) // elements, size), dtype=np.uint8)
    if kind == "MXFP4":
        data[data[:, 0] == 0xFF, 0] = 0
    elif kind != "NVFP4":
        for at in (1, 3) if kind in ("Q4_1", "Q4_K") else (1,):  # the upper byte of a float16
            data[(data[:, at] & 0x7C) == 0x7C, at] &= 0x83
    return data


def small_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Random blocks of a 4-bit type whose values are about as large as those of a model's weights."""
    data = random_blocks(kind, shape, seed)
    if kind == "MXFP4":
        data[:, 0] = 120 + (data[:, 0] & 1)
    elif kind == "NVFP4":
        data[:, :4] = 0x08 | (data[:, :4] & 7)
    else:
        for at in (1, 3) if kind in ("Q4_1", "Q4_K") else (1,):
            data[:, at] = 0x08 | (data[:, at] & 0x83)
    return data


def tensors_of(model: Any) -> dict[str, Any]:
    """The weights in the layout of a GGUF file, in which experts have one stack for gate and one for up."""
    found = {}
    for name, tensor in model.state_dict().items():
        for long, short in SHORT.items():
            name = name.replace(long, short)
        values = tensor.float().numpy()
        if name.endswith("mlp.experts.gate_up_proj"):
            stem = name.removesuffix("mlp.experts.gate_up_proj")
            found[f"{stem}ffn_gate_exps.weight"], found[f"{stem}ffn_up_exps.weight"] = np.split(values, 2, axis=1)
        else:
            found[name.replace("mlp.experts.down_proj", "ffn_down_exps.weight")] = values
    return found


def write(
    model: Any,
    path: pathlib.Path,
    architecture: str,
    more: dict[str, Any] | None = None,
    kinds: Sequence[str] = ("F32", "F16", "BF16", "Q8_0"),
    of: Mapping[str, str | None] | None = None,
) -> None:
    """Writes the model to a GGUF file whose matrices have these types in turn.

    Matrices of 4-bit types that the gguf package cannot make have random values.

    Args:
        of: other types of single tensors, by name; tensors with None are left out.
    """
    config, tokens = model.config, 128
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "num_experts", 0):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"<{i}>" for i in range(3, tokens))])
    writer.add_token_types([1] * tokens)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(2)
    for i, (name, values) in enumerate((tensors_of(model) | (more or {})).items()):
        type_name = (of or {}).get(name, kinds[i % len(kinds)] if values.ndim > 1 else "F32")
        if type_name is None:
            continue
        kind = gguf.GGMLQuantizationType[type_name]
        try:
            data = gguf.quantize(values, kind)
        except NotImplementedError:
            data = small_blocks(kind.name, values.shape, i).reshape(gguf.quant_shape_to_byte_shape(values.shape, kind))
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(make("llama"), path, "llama")
    return path


@pytest.fixture(scope="module")
def four_bit_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Llama whose matrices have every 4-bit type and Q8_0 in turn."""
    path = tmp_path_factory.mktemp("gguf") / "four_bit.gguf"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE), dtype=torch.float32)
    write(model, path, "llama", kinds=[*blocks.KINDS, "Q8_0"])
    return path
