"""Runs MLPs in chunks of tokens, which limits the size of their intermediate tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn.model import Model

_NAMES = ("mlp", "feed_forward")


def dense_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs of ``model`` that are not mixtures of experts.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> len(qlora_ext.streaming.dense_mlps(model))
        2
    """
    named = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in _NAMES]
    return [module for _, module in named if not hasattr(module, "experts")]


def chunk_mlp(model: Model, tokens: int) -> Model:
    """Runs every dense MLP of ``model`` on at most ``tokens`` tokens of a row at a time, and recomputes it backward.

    The MLP saves nothing between forward and backward. Its memory is that of one chunk, instead of the 4 x tokens x
    intermediate size of a gated MLP. The cost is one additional forward pass of the MLP. Dropout draws other masks than
    for all tokens at once. Mixtures of experts do not change.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: ``tokens`` is not a positive integer, or the model has no dense MLP.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> model = qlora_ext.streaming.chunk_mlp(model, 8)
        >>> model(torch.randint(0, 128, (1, 32))).logits.shape
        torch.Size([1, 32, 128])
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens: expected a positive integer, got {tokens!r}")
    found = dense_mlps(model)
    if not found:
        raise ValueError(f"model: expected one with dense MLPs (modules named {' or '.join(_NAMES)}), found none")
    for module in found:
        module.forward = functools.partial(_chunked, module.forward, tokens)
    return model


def _chunked(forward: Callable[[Tensor], Tensor], tokens: int, x: Tensor) -> Tensor:
    if x.shape[-2] <= tokens:
        return forward(x)
    if torch.is_grad_enabled():
        parts = [checkpoint(forward, part, use_reentrant=False) for part in x.split(tokens, dim=-2)]
    else:
        parts = [forward(part) for part in x.split(tokens, dim=-2)]
    return torch.cat(parts, dim=-2)
