"""A module of experts in transformers' layout, and routing for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """A module of the kind that transformers decorates, computed expert by expert in a simple loop."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, experts: int = 5, hidden: int = 64, inner: int = 48, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_experts, self.limit = experts, 0.5
        first = 2 * inner if self.has_gate else inner
        shapes = {("gate_up_proj" if self.has_gate else "up_proj"): (first, hidden), "down_proj": (hidden, inner)}
        for name, (n, k) in shapes.items():
            matrix = (k, n) if self.is_transposed else (n, k)
            setattr(self, name, nn.Parameter(torch.randn(experts, *matrix, dtype=dtype) / k**0.5))
            if self.has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(experts, n, dtype=dtype)))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * (up + self.limit)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for t, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for e, weight in zip(chosen.tolist(), weights, strict=True):
                if e < self.num_experts:
                    out[t] = out[t] + weight * self.one(e, hidden_states[t])
        return out

    def one(self, e: int, x: Tensor) -> Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        h = self.linear(first, e, x)
        return self.linear("down_proj", e, self._apply_gate(h) if self.has_gate else self.act_fn(h))

    def linear(self, name: str, e: int, x: Tensor) -> Tensor:
        w = getattr(self, name)[e]
        y = x @ (w if self.is_transposed else w.T)
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y


def routing(tokens: int = 11, k: int = 2, experts: int = 5) -> tuple[Tensor, Tensor]:
    weights = torch.rand(tokens, experts)
    top, index = weights.topk(k, dim=-1)
    return index, top / top.sum(-1, keepdim=True)
