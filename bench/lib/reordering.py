"""Puts the features of a Llama model into another order, which changes the blocks of its weights and not its outputs.

A checkpoint whose weights were decoded from a 4-bit format fits that format's blocks better than a model ever trained.
With its features in another order, a block holds weights from many of those blocks.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def reorder(model: Any) -> Any:
    """``model`` with its hidden features, those of each MLP and those of each head's values in a random order."""
    generator = torch.Generator().manual_seed(0)

    def drawn(size: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)

    def take(parameter: torch.nn.Parameter, order: torch.Tensor, dim: int) -> None:
        parameter.copy_(parameter.index_select(dim, order))

    config, body = model.config, model.model
    hidden = drawn(config.hidden_size)
    take(body.embed_tokens.weight, hidden, 1)
    if model.lm_head.weight is not body.embed_tokens.weight:
        take(model.lm_head.weight, hidden, 1)
    take(body.norm.weight, hidden, 0)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            take(norm.weight, hidden, 0)
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            take(reads.weight, hidden, 1)
        for writes in (attention.o_proj, mlp.down_proj):
            take(writes.weight, hidden, 0)
        inner = drawn(config.intermediate_size)
        take(mlp.gate_proj.weight, inner, 0)
        take(mlp.up_proj.weight, inner, 0)
        take(mlp.down_proj.weight, inner, 1)
        size = attention.head_dim
        values = drawn(size)  # the same in all heads, because query heads share their values
        for projection, heads, dim in (
            (attention.v_proj, config.num_key_value_heads, 0),
            (attention.o_proj, config.num_attention_heads, 1),
        ):
            starts = size * torch.arange(heads, dtype=torch.int64)
            take(projection.weight, (starts[:, None] + values).flatten(), dim)
    return model
