"""What the linear operators compute for a sample, each result with its exact value and bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accuracy import Expected, assert_accurate, concatenate
from samples import LinearSample

Results = list[tuple[Tensor, Expected]]
OPS = torch.ops.qlora


def gradient(s: LinearSample, seed: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*s.x.shape[:-1], s.w4.shape[0], generator=generator).to(s.x.device, s.x.dtype)


def forward(s: LinearSample, dy: Tensor) -> Results:
    return [(OPS.linear_nf4(*s.args), s.forward_accuracy())]


def dx(s: LinearSample, dy: Tensor) -> Results:
    out = OPS.linear_nf4_dx(*s.dx_args(dy))
    return [(out, s.dx_accuracy(dy))]


def dlora(s: LinearSample, dy: Tensor) -> Results:
    out = OPS.linear_nf4_dlora(dy, s.x, *s.lora_args)
    return list(zip(out, s.dlora_accuracy(dy), strict=True))


RESULTS = {"linear_nf4": forward, "linear_nf4_dx": dx, "linear_nf4_dlora": dlora}


def call(op: str, s: LinearSample, dy: Tensor) -> tuple[Tensor, ...]:
    """The results alone."""
    if op == "linear_nf4":
        return (OPS.linear_nf4(*s.args),)
    if op == "linear_nf4_dx":
        return (OPS.linear_nf4_dx(*s.dx_args(dy)),)
    return OPS.linear_nf4_dlora(dy, s.x, *s.lora_args)


def check_samples(
    results: Callable[[LinearSample, Tensor], Results],
    make_sample: Callable[[int], tuple[LinearSample, Tensor]],
    entries: int = 4000,
) -> tuple[Tensor, ...]:
    """Over seeds until each result has ``entries``, because a norm of random errors varies by chance. Gives the results
    of the first seed."""
    pooled: dict[int, list[tuple[Tensor, Expected]]] = {}
    for seed in range(64):
        for i, result in enumerate(results(*make_sample(seed))):
            pooled.setdefault(i, []).append(result)
        if min(sum(out.numel() for out, _ in parts) for parts in pooled.values()) >= entries:
            break
    for parts in pooled.values():
        out, expected = zip(*parts, strict=True)
        assert_accurate(torch.cat([t.reshape(-1, t.shape[-1]) for t in out]), concatenate(expected))
    return tuple(parts[0][0] for parts in pooled.values())
