"""Directories of tiny random models of the families that are written as GGUF, with tokenizers trained on this text."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tiny_models import SIZES

VOCABULARY = 320
_SIZES = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 1024}
_TEXT = pathlib.Path(__file__).read_text().splitlines()
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
_LONG = {
    "rope_type": "longrope",
    "long_factor": [1.5 + i for i in range(8)],
    "short_factor": [1.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
_LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
_GEMMA3_ROPE = {
    "full_attention": _LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
# llama.cpp rounds the bounds of YaRN's ramp, which with this base are whole numbers.
_GPT_OSS_ROPE = {**_YARN, "truncate": False, "rope_theta": (64 / (2 * math.pi)) ** (8 / 3) * (1 + 1e-6)}
_GPT_OSS_ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0}
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
# Families and what they have beside the usual sizes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3, "head_dim": 32, "tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LINEAR}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 96, "norm_topk_prob": True}),
    "gemma2": ("gemma2", {"num_hidden_layers": 3, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **{"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
            **{"final_logit_softcapping": 20.0, "rope_parameters": _GEMMA3_ROPE},
        },
    ),
    "phi3": ("phi3", {}),
    "longrope": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 512}),
    "partial": ("phi3", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "granite": (
        "granite",
        {
            **{"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
            **{"attention_multiplier": 0.1, "attention_bias": True},
        },
    ),
    "olmo2": ("olmo2", {}),
    "gpt_oss": (
        "gpt_oss",
        {
            **{**_EXPERTS, "num_local_experts": 4, "num_hidden_layers": 3, "sliding_window": 16},
            "rope_parameters": _GPT_OSS_ROPE,
        },
    ),
}  # fmt: skip


def config_of(variant: str, **changes: Any) -> Any:
    family, fields = VARIANTS[variant]
    return CONFIG_MAPPING[family](**{**_SIZES, **fields, **changes})


def make(config: Any) -> Any:
    """A model whose logits depend on all of its weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 0.0 if "gemma" in config.model_type else 1.0, 0.3)
        elif name.endswith("bias") or "sinks" in name:
            torch.nn.init.normal_(p, std=0.1)
        else:
            p.data.mul_(4)
    return model


def byte_level(split: str | None = None, size: int = VOCABULARY, **of_model: Any) -> PreTrainedTokenizerFast:
    """A BPE on bytes, with GPT-2's pre-tokenizer, or one that splits by a regular expression."""
    tokenizer = Tokenizer(models.BPE(**of_model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece(prefix: bool, begins: bool) -> PreTrainedTokenizerFast:
    """A BPE as tokenizers makes of SentencePiece's models.

    Args:
        prefix: whether a text begins with a space.
        begins: whether it begins with a special token.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "\u2581")
    learned.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    learned.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    vocabulary = learned.get_vocab()
    # SentencePiece merges any two tokens whose text is one, in the order of the results.
    order = dict.fromkeys(left + right for left, right in json.loads(learned.to_str())["model"]["merges"])
    merges = [
        (token[:i], token[i:])
        for token in order
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special[:3]])
    tokenizer.add_tokens([AddedToken("<|user|>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def save(directory: pathlib.Path, model: Any, tokenizer: Callable[[], Any] = byte_level) -> pathlib.Path:
    logging.disable_progress_bar()  # which a test would find among what a command prints
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
