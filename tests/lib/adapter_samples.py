"""Problems whose rows use different adapters, and the calls with one adapter whose bits they must have."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import qlora_ext
from qlora_ext.adapters import StackedAdapters, stack_adapters
from qlora_ext.form import Form
from qlora_ext.weight import Weight4bit, quantize

RANKS = (4, 0, 8, 3)


@dataclasses.dataclass(kw_only=True)
class Adapters:
    """Several adapters, and the one of each row."""

    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scaling: list[float]
    of_row: Tensor
    dropout_p: float = 0.0
    seeds: list[int] | None = None

    def seed_of(self, adapter: int) -> int:
        return self.seeds[adapter] if self.seeds and adapter >= 0 else 7

    def stacked(self) -> StackedAdapters:
        return stack_adapters(self.lora_a, self.lora_b, self.scaling, self.seeds)


@dataclasses.dataclass(kw_only=True)
class Batch(Adapters):
    """A layer, the tokens of several adapters, and the calls with one of them."""

    x: Tensor
    w4: Weight4bit
    bias: Tensor | None

    def together(self, x: Tensor | None = None) -> Tensor:
        numbers = self.scaling, self.dropout_p, self.seeds or 7, self.of_row
        return qlora_ext.linear_nf4(self.x if x is None else x, self.w4, self.bias, self.lora_a, self.lora_b, *numbers)

    def alone(self, adapter: int) -> Tensor:
        if adapter < 0:
            return qlora_ext.linear_nf4(self.x, self.w4, self.bias)
        lora = self.lora_a[adapter], self.lora_b[adapter], self.scaling[adapter]
        return qlora_ext.linear_nf4(self.x, self.w4, self.bias, *lora, self.dropout_p, self.seed_of(adapter))

    def of_alone(self, compute=None) -> Tensor:
        """Each row of the call with its adapter alone; ``compute(adapter)`` is what those calls give."""
        compute = compute or self.alone
        out = {e: compute(e) for e in set(self.of_row.tolist())}
        return torch.stack([out[e][i] for i, e in enumerate(self.of_row.tolist())])

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.lora_a, *self.lora_b]


def batch(
    m=9, n=48, k=64, ranks=RANKS, dtype=torch.float32, order="random", requires_grad=False, device="cpu", **options
) -> Batch:
    generator = torch.Generator().manual_seed(m * n + k)

    def randn(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * factor).to(device, dtype).requires_grad_(requires_grad)

    of_row = torch.randint(-1, len(ranks), (m,), generator=generator)
    if order == "sorted":
        of_row = of_row.sort()[0]
    form = {name: options.pop(name) for name in ("block_size", "double_quant", "code") if name in options}
    w = (torch.randn(n, k, generator=generator) * 0.05).to(device)
    return Batch(
        x=randn(m, k),
        w4=quantize(w, Form.of(**form)),
        bias=randn(n),
        lora_a=[randn(rank, k, factor=k**-0.5) for rank in ranks],
        lora_b=[randn(n, rank, factor=0.2) for rank in ranks],
        scaling=[0.3 + 0.7 * e for e in range(len(ranks))],
        of_row=of_row.int().to(device),
        **options,
    )


def dx_args(b: Batch, dy: Tensor, adapter: int | None) -> tuple:
    """The arguments of linear_nf4_dx for one adapter, or for all of them (None)."""
    k = b.x.shape[-1]
    if adapter is None:
        s = b.stacked()
        seed = 0 if b.seeds else 7
        last = b.of_row, s.rank_offsets, s.scalings, s.seeds, s.max_rank
        return dy, *b.w4.operands(k, s.lora_a, s.lora_b, 1.0, b.dropout_p, seed, None), *last
    lora = (None, None, 1.0) if adapter < 0 else (b.lora_a[adapter], b.lora_b[adapter], b.scaling[adapter])
    return dy, *b.w4.operands(k, *lora, b.dropout_p, b.seed_of(adapter), None)


def forward_args(b: Batch) -> tuple:
    s = b.stacked()
    last = b.of_row, s.rank_offsets, s.scalings, s.seeds, s.max_rank
    lora = s.lora_a, s.lora_b, 1.0, b.dropout_p, 0 if b.seeds else 7, None
    return b.x, *b.w4.operands(b.w4.shape[0], b.bias, *lora), *last


def check_bits(b: Batch) -> None:
    """y, dx and the retained h and g against calls with one adapter."""
    assert torch.equal(b.together(), b.of_alone())
    dy = torch.randn(*b.x.shape[:-1], b.w4.shape[0]).to(b.x.dtype)
    dx, g = torch.ops.qlora.linear_nf4_dx_with_g(*dx_args(b, dy, None))
    assert torch.equal(dx, b.of_alone(lambda e: torch.ops.qlora.linear_nf4_dx(*dx_args(b, dy, e))))
    y, h = torch.ops.qlora.linear_nf4_with_h(*forward_args(b))
    assert torch.equal(y, b.together())
    for i, e in enumerate(b.of_row.tolist()):
        rank = b.lora_a[e].shape[0] if e >= 0 else 0
        assert not h[i, rank:].any()
        assert not g[i, rank:].any()
        if rank:
            assert torch.equal(g[i, :rank], torch.ops.qlora.linear_nf4_dx_with_g(*dx_args(b, dy, e))[1][i])
            lora = b.lora_a[e], b.lora_b[e], b.scaling[e], b.dropout_p, b.seeds[e] if b.seeds else 7, None
            args = b.x, *b.w4.operands(b.w4.shape[0], b.bias, *lora)
            assert torch.equal(h[i, :rank], torch.ops.qlora.linear_nf4_with_h(*args)[1][i])
