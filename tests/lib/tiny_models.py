"""Random language models of the families that differ in their linear layers, small enough to build in a test."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tensors import same_bits
from tiny_configs import config_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),  # biases on q, k, v
    "phi3": lambda: Phi3Config(**SIZES),  # fused qkv and gate_up
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),  # Conv1D: transposed weights
}
FAMILIES = list(CONFIGS)
_EXPERTS = {**SIZES, "intermediate_size": 96, "num_experts_per_tok": 2}
MIXTURES: dict[str, Any] = {
    "mixtral": lambda: MixtralConfig(**_EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_EXPERTS,
        moe_intermediate_size=48,  # rows that are not a multiple of the block
        num_experts=6,
        head_dim=16,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    # Experts with transposed weights, biases, and their own gate function.
    "gpt_oss": lambda: GptOssConfig(**_EXPERTS, num_local_experts=4, head_dim=16, sliding_window=8),
}


def make(family: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A model with distinct weights and, if it has biases, nonzero biases. Its family may be any of transformers'."""
    torch.manual_seed(seed)
    known = {**CONFIGS, **MIXTURES}
    model = AutoModelForCausalLM.from_config(known[family]() if family in known else config_of(family), dtype=dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
        elif family in MIXTURES and "gate.weight" in name:
            torch.nn.init.normal_(p)  # every expert gets tokens
    return model.eval()


def save_tiny_llama(directory: pathlib.Path, seed: int) -> None:
    """A random two-layer Llama with a byte-level tokenizer (257 tokens)."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=256,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)


def add_special_tokens(tokenizer: Any, single: str) -> Any:
    """Has the tokenizer of ``save_tiny_llama`` put special tokens around each text, as in "<bos> $A <eos>"."""
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return tokenizer


def token_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    """Those of ``token_ids()``, unless given."""
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids() if ids is None else ids, **inputs).logits
    return out


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules have the same tensors, by name and bit by bit."""
    return same_bits(a.state_dict(), b.state_dict())
