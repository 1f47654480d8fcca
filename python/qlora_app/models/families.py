"""Sizes of well-known models from their published configurations, for planning without their files."""

from __future__ import annotations

import re
from typing import Any

from qlora_ext.untrusted import excerpt

# model_type, vocabulary, hidden size, intermediate size, layers, heads, key-value heads, tied head
_FAMILIES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "llama-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, False),
    "llama-13b": ("llama", 32000, 5120, 13824, 40, 40, 40, False),
    "llama-33b": ("llama", 32000, 6656, 17920, 60, 52, 52, False),
    "llama-65b": ("llama", 32000, 8192, 22016, 80, 64, 64, False),
    "llama-2-70b": ("llama", 32000, 8192, 28672, 80, 64, 8, False),
    "llama-3-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
    "llama-3-70b": ("llama", 128256, 8192, 28672, 80, 64, 8, False),
    "llama-3.1-405b": ("llama", 128256, 16384, 53248, 126, 128, 8, False),
    "mistral-7b": ("mistral", 32000, 4096, 14336, 32, 32, 8, False),
    "mixtral-8x7b": ("mixtral", 32000, 4096, 14336, 32, 32, 8, False),
    "qwen3-30b-a3b": ("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, False),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, True),
    "smollm2-1.7b": ("llama", 49152, 2048, 8192, 24, 32, 32, True),
}

# Additional settings of mixtures of experts.
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3-30b-a3b": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
}


def names() -> list[str]:
    """The names of the known models."""
    return list(_FAMILIES)


def known(name: str) -> bool:
    """Whether ``name`` is a known model; owner and variant are ignored."""
    return _key(name) in _FAMILIES


def _key(name: str) -> str:
    """A hub name without owner and variant: llama-2-70b for meta-llama/Llama-2-70b-hf."""
    key = name.rpartition("/")[2].lower().replace("meta-", "")
    for suffix in ("-instruct", "-chat", "-hf", "-it", "-v0.1"):
        key = key.replace(suffix, "")
    for name_, (prefix) in (("llama-2-7b", "llama-7b"), ("llama-2-13b", "llama-13b"), ("llama-30b", "llama-33b")):
        key = prefix if key == name_ else key
    return key


def _config(
    kind: str, vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool = False,
    **more: Any,
) -> Any:  # fmt: skip
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        **more,
    )


def config(name: str) -> Any:
    """The transformers configuration of a known model, such as llama-3-8b or meta-llama/Meta-Llama-3-8B."""
    return _config(*_FAMILIES[_key(name)], **_EXPERTS.get(_key(name), {}))


def config_of_sizes(text: str) -> Any:
    """The configuration of a Llama with the sizes in ``text``.

    Args:
        text: ``hidden=N,intermediate=N,layers=N,heads=N[,kv-heads=N][,vocab=N]``.

    Raises:
        ValueError: ``text`` has another form, or the sizes do not fit together.
    """
    sizes = {"vocab": 32000}
    for part in text.split(","):
        key, _, value = part.partition("=")
        known = key.strip() in ("hidden", "intermediate", "layers", "heads", "kv-heads", "vocab")
        if not known or not re.fullmatch("[0-9]+", value):
            raise ValueError(f"sizes {text}: expected hidden=N,intermediate=N,layers=N,heads=N[,kv-heads=N][,vocab=N]")
        if len(value) > 6:
            raise ValueError(f"sizes {excerpt(text)}: expected numbers below a million")
        sizes[key.strip()] = int(value)
    needed = ("hidden", "intermediate", "layers", "heads")
    missing = [key for key in needed if key not in sizes]
    missing += [key for key, size in sizes.items() if not size]
    if missing:
        raise ValueError(f"sizes {text}: {', '.join(missing)} is missing or 0")
    if sizes["hidden"] % sizes["heads"] or sizes["heads"] % sizes.get("kv-heads", 1):
        raise ValueError(f"sizes {text}: expected hidden to be a multiple of heads, and heads of kv-heads")
    vocab, hidden, intermediate, layers, heads = (sizes[k] for k in ("vocab", *needed))
    return _config("llama", vocab, hidden, intermediate, layers, heads, sizes.get("kv-heads", heads))
