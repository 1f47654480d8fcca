"""Weights and second moments of inputs, for the search for scales and for codes with error feedback."""

from __future__ import annotations

import torch


def weight(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    w = torch.randn(n, k)
    w[:, 0] *= 20  # a column that determines the scale of its block
    return w.to(dtype)


def moments(k: int) -> torch.Tensor:
    x = torch.randn(4 * k + 3, k) * torch.rand(k).exp()
    x[:, k // 2] = 0
    return x.T @ x / len(x) + 0.01 * torch.eye(k)


def feedback_of(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = h.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(h[order][:, order].double())
    return torch.linalg.cholesky(inverse, upper=True).float().contiguous(), order
