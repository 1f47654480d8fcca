"""Random language models of the families that differ in their linear layers, small enough to build in a test."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, PreTrainedTokenizerFast, Qwen2Config

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


def make(family: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A model with distinct weights and, if it has biases, nonzero biases. Its family may be any of transformers'."""
    torch.manual_seed(seed)
    config = CONFIGS[family]() if family in CONFIGS else config_of(family)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
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


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules have the same tensors, by name and bit by bit."""
    state, other = a.state_dict(), b.state_dict()
    return state.keys() == other.keys() and all(_same(t, other[name]) for name, t in state.items())


def _same(t: torch.Tensor, other: torch.Tensor) -> bool:
    if t.dtype != other.dtype or t.shape != other.shape:
        return False
    return torch.equal(t.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
