"""GGUF files of tiny models."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from packed_models import Checkpoint
from qlora_ext.gguf import blocks
from tiny_models import SIZES, make

# Sizes of which every matrix has whole blocks of every type.
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 512}
# Sizes of a model whose file can have a tokenizer of all bytes.
WITH_BYTES = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 257}

# The upper bytes of the float16 numbers in a block of each type that is used as it is.
FLOAT16 = {kind: (1, 3) if kind in ("Q4_1", "Q4_K", "Q5_1", "Q5_K") else (1,) for kind in blocks.KINDS} | {
    "MXFP4": (),
    "NVFP4": (),
    "Q6_K": (209,),
}

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

# gpt-oss' own names, which follow those of ``SHORT``.
GPT_OSS = {
    ".ffn_norm": ".post_attention_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router.": "ffn_gate_inp.",
    "mlp.experts.": "ffn_experts.",
}


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Random blocks [blocks, bytes per block] of a type whose scales are finite."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.random.default_rng(seed).integers(0, 256, (math.prod(shape) // elements, size), dtype=np.uint8)
    if kind == "MXFP4":
        data[data[:, 0] == 0xFF, 0] = 0
    for at in FLOAT16.get(kind, (1,)):
        data[(data[:, at] & 0x7C) == 0x7C, at] &= 0x83
    return data


def without_signed_zeros(kind: str, data: np.ndarray) -> np.ndarray:
    """The blocks with the code 0 for each 8 of E2M1: both stand for 0 in ggml's table, which has no -0."""
    if kind not in ("MXFP4", "NVFP4"):
        return data
    header = blocks._LAYOUTS[kind].parts["header"]
    codes = data[:, header:]
    low, high = codes & 0x0F, codes & 0xF0
    codes = np.where(low == 0x08, 0, low) | np.where(high == 0x80, 0, high)
    return np.concatenate((data[:, :header], codes), axis=1)


def small_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Random blocks of a type whose values are about as large as those of a model's weights."""
    data = random_blocks(kind, shape, seed)
    if kind == "MXFP4":
        data[:, 0] = 120 + (data[:, 0] & 1)
    elif kind == "NVFP4":
        data[:, :4] = 0x08 | (data[:, :4] & 7)
    for at in FLOAT16.get(kind, (1,)):
        data[:, at] = (0x04 if kind == "Q6_K" else 0x08) | (data[:, at] & 0x83)
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


def writer_of(config: Any, path: pathlib.Path, architecture: str) -> gguf.GGUFWriter:
    """A writer of a file with that configuration. With the sizes ``WITH_BYTES`` it can read any text."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "num_experts", 0):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    writer.add_tokenizer_model("gpt2")
    letters, merged, end = (["t", "1"], "t1", 2)
    if config.vocab_size == WITH_BYTES["vocab_size"]:
        letters, merged, end = sorted(pre_tokenizers.ByteLevel.alphabet()), "th", WITH_BYTES["eos_token_id"]
    tokens = [*letters, merged]
    tokens += [f"<{i}>" for i in range(len(tokens), config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i == end else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merged)])
    writer.add_eos_token_id(end)
    return writer


def write(
    model: Any,
    path: pathlib.Path,
    architecture: str,
    more: dict[str, Any] | None = None,
    kinds: Sequence[str] = ("F32", "F16", "BF16"),
    of: Mapping[str, str | None] | None = None,
) -> None:
    """Writes the model to a GGUF file whose matrices have these types in turn.

    Matrices of types that the gguf package cannot make have random values.

    Args:
        of: other types of single tensors, by name; tensors with None are left out.
    """
    writer = writer_of(model.config, path, architecture)
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
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gpt_oss(checkpoint: Checkpoint, path: pathlib.Path, without: str = "$^") -> None:
    """Writes an MXFP4 checkpoint of gpt-oss to a GGUF file, as llama.cpp converts it.

    Args:
        without: a regular expression of tensors that are left out.
    """
    config = checkpoint.dense.config
    writer = writer_of(config, path, "gpt-oss")
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])

    def add(name: str, data: Any, kind: str = "F32") -> None:
        if not re.search(without, name):
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind])

    for key, t in checkpoint.tensors.items():
        name = key
        for long, short in (SHORT | GPT_OSS).items():
            name = name.replace(long, short)
        if "ffn_experts" not in name:
            add(name, gguf.quantize(t.numpy(), gguf.GGMLQuantizationType.Q8_0) if "attn_q.w" in name else t.numpy(),
                "Q8_0" if "attn_q.w" in name else "F32")  # fmt: skip
            continue
        stem, _, part = name.partition("ffn_experts.")
        if part.endswith("_scales"):
            continue
        halves = {"gate": np.s_[:, 0::2], "up": np.s_[:, 1::2]} if part.startswith("gate_up") else {"down": np.s_[:]}
        for half, rows in halves.items():
            to = f"{stem}ffn_{half}_exps"
            if part.endswith("_bias"):
                add(f"{to}.bias", t.numpy()[rows])
                continue
            scales = checkpoint.tensors[key.replace("_blocks", "_scales")]
            codes = np.stack((t.numpy() & 15, t.numpy() >> 4), axis=-1).reshape(*t.shape[:-1], 32)
            packed = codes[..., :16] | codes[..., 16:] << 4
            blocks = np.concatenate((scales.numpy()[..., None], packed), axis=-1)[rows]
            add(f"{to}.weight", blocks.reshape(*blocks.shape[:2], -1), "MXFP4")
    finish(writer)


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(make("llama"), path, "llama")
    return path


@pytest.fixture(scope="module")
def four_bit_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Llama whose matrices have every type that is used as it is, F16 and IQ3_XXS."""
    path = tmp_path_factory.mktemp("gguf") / "four_bit.gguf"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE), dtype=torch.float32)
    write(model, path, "llama", kinds=[*blocks.KINDS[:8], "F16", "F16", *blocks.KINDS[8:], "IQ3_XXS"])
    return path
