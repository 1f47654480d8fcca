"""Problems whose rows use different adapters, over one weight or over experts, and the calls with one adapter that have
the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import qlora_ext
from grouped_samples import OPS, GroupedSample, grouped_sample
from qlora_ext.adapters import StackedAdapters, stack_adapters
from qlora_ext.form import Form
from qlora_ext.weight import Weight4bit, operands, quantize

RANKS = (4, 0, 8, 3)
# The arguments of every operator that describe a weight.
WEIGHT = [a.name for a in OPS.dequantize_nf4.default._schema.arguments if a.name not in ("shape", "dtype")]


@dataclasses.dataclass(kw_only=True)
class Adapters:
    """Several adapters, the one of each row, and the operators over a layer, of which the classes below have one."""

    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scaling: list[float]
    of_row: Tensor
    dropout_p: float = 0.0
    seeds: list[int] | None = None
    operator = "linear_nf4"

    def seed_of(self, adapter: int) -> int:
        return self.seeds[adapter] if self.seeds and adapter >= 0 else 7

    def stacked(self) -> StackedAdapters:
        return stack_adapters(self.lora_a, self.lora_b, self.scaling, self.seeds)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.lora_a, *self.lora_b]

    def lora(self, adapter: int | None) -> dict[str, Any]:
        """The arguments for one adapter, for none (-1) or for all (None)."""
        if adapter is None:
            s = self.stacked()
            several = {"adapter_of_row": self.of_row, "rank_offsets": s.rank_offsets, "scalings": s.scalings}
            several |= {"seeds": s.seeds, "max_rank": s.max_rank, "seed": 0 if self.seeds else 7}
            return {"lora_a": s.lora_a, "lora_b": s.lora_b, "scaling": 1.0, "dropout_p": self.dropout_p, **several}
        if adapter < 0:
            return {"lora_a": None, "lora_b": None, "scaling": 1.0, "dropout_p": 0.0, "seed": 0}
        numbers = {"scaling": self.scaling[adapter], "dropout_p": self.dropout_p, "seed": self.seed_of(adapter)}
        return {"lora_a": self.lora_a[adapter], "lora_b": self.lora_b[adapter], **numbers}

    def arguments(self, name: str, adapter: int | None = None, dy: Tensor | None = None) -> dict[str, Any]:
        """The arguments of the operator whose name ends with ``name``: "", "_with_h", "_dx", "_dx_with_g", "_dlora"."""
        n, k = self.shape
        if name == "_dlora":
            offsets = {key: value for key, value in self.weight.items() if key == "offsets"}
            return {"dy": dy, "x": self.x, **offsets, **self.lora(adapter)}
        if name.startswith("_dx"):
            return {"dy": dy, **self.weight, "in_features": k, **self.lora(adapter)}
        return {"x": self.x, **self.weight, "out_features": n, "bias": self.bias, **self.lora(adapter)}

    def run(self, name: str, adapter: int | None = None, dy: Tensor | None = None, **more: Any) -> Any:
        return getattr(OPS, self.operator + name)(**self.arguments(name, adapter, dy), **more)

    def dy(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*self.x.shape[:-1], self.shape[0], generator=generator).to(self.x)

    def check(self, gradients: bool = True) -> None:
        """All outputs against those of calls with one adapter."""
        dy = self.dy()
        (y, h), (dx, g) = self.run("_with_h"), self.run("_dx_with_g", dy=dy)
        assert torch.equal(y, self.run(""))
        assert torch.equal(dx, self.run("_dx", dy=dy))
        first = 0
        for e in sorted({*range(-1, len(self.lora_a))} if gradients else {*self.of_row.tolist()}):
            own = self.of_row == e
            assert torch.equal(y[own], self.run("", e)[own])
            assert torch.equal(dx[own], self.run("_dx", e, dy)[own])
            rank = self.lora_a[e].shape[-2] if e >= 0 else 0
            assert not h[own, rank:].any()
            assert not g[own, rank:].any()
            if rank:
                assert torch.equal(h[own, :rank], self.run("_with_h", e)[1][own])
                assert torch.equal(g[own, :rank], self.run("_dx_with_g", e, dy)[1][own])
            if gradients and e >= 0:
                self._check_gradients(e, slice(first, first + rank), dy, h, g)
                first += rank
        assert not any(t[self.unassigned].any() for t in (y, h, dx, g))

    def _check_gradients(self, e: int, ranks: slice, dy: Tensor, h: Tensor, g: Tensor) -> None:
        own, rank = self.of_row == e, ranks.stop - ranks.start
        for low_rank in ({}, {"h": h, "g": g}):
            da, db = self.run("_dlora", dy=dy, **low_rank)
            if self.dropout_p == 0.0 and not dy.is_cuda:  # on CUDA, the number of rows decides how sums are split
                of_own = {name: t[own, :rank] for name, t in low_rank.items()}
                expected = self.only(e).run("_dlora", e, dy[own], **of_own)
                tolerance = 0.0
            else:  # the mask depends on the index of a row: the same sums, in another order
                expected = self.run("_dlora", e, torch.where(own[:, None], dy, 0))
                tolerance = {torch.float32: 1e-5, torch.float64: 1e-6}.get(dy.dtype, 2e-2)
            for found, of_e in zip((da[..., ranks, :], db[..., ranks]), expected, strict=True):
                torch.testing.assert_close(found, of_e, rtol=tolerance, atol=tolerance)


@dataclasses.dataclass(kw_only=True)
class Batch(Adapters):
    """A layer, the tokens of several adapters, and the calls with one of them."""

    x: Tensor
    w4: Weight4bit
    bias: Tensor | None
    unassigned = slice(0, 0)

    @property
    def shape(self) -> torch.Size:
        return self.w4.shape

    @property
    def weight(self) -> dict[str, Any]:
        return dict(zip(WEIGHT, self.w4.operands(), strict=True))

    def only(self, adapter: int) -> Batch:
        """The problem of the rows of an adapter."""
        own = self.of_row == adapter
        return dataclasses.replace(self, x=self.x[own], of_row=self.of_row[own])

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


@dataclasses.dataclass(kw_only=True)
class ExpertBatch(Adapters):
    """Experts, adapters [E, R, K] and [E, N, R], and the adapter of each row."""

    g: GroupedSample
    operator = "grouped_linear_nf4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.g.n, self.g.k

    @property
    def x(self) -> Tensor:
        return self.g.x

    @property
    def bias(self) -> Tensor | None:
        return self.g.bias

    @property
    def unassigned(self) -> slice:
        return self.g.unassigned()

    @property
    def weight(self) -> dict[str, Any]:
        g = self.g
        return dict(zip(WEIGHT, operands(g.stack, g.weights[0]), strict=True)) | {"offsets": g.offsets}

    def only(self, adapter: int) -> ExpertBatch:
        """The problem of the rows of an adapter."""
        own = self.of_row == adapter
        rows = own[: self.unassigned.start].split(list(self.g.counts))
        g = dataclasses.replace(self.g, x=self.g.x[own], counts=[int(r.sum()) for r in rows])
        return dataclasses.replace(self, g=g, of_row=self.of_row[own])


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


def expert_batch(counts=9, n=48, k=64, ranks=RANKS, dtype=torch.float32, order="random", **options) -> ExpertBatch:
    """``counts``: the rows of each expert, or the number of all rows, of which some are assigned to none."""
    if isinstance(counts, int):
        options["unassigned"] = counts // 4
        counts = [counts // 3, 0, counts - counts // 3 - counts // 4]
    more = {name: options.pop(name) for name in ("dropout_p", "seeds") if name in options}
    g = grouped_sample(counts, n, k, None, dtype, **options)
    generator = torch.Generator().manual_seed(len(g.x) * g.n + g.k)

    def randn(*shape: int, factor: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * factor).to(g.x)

    of_row = torch.randint(-1, len(ranks), (len(g.x),), generator=generator)
    return ExpertBatch(
        g=g,
        lora_a=[randn(len(counts), rank, g.k, factor=g.k**-0.5) for rank in ranks],
        lora_b=[randn(len(counts), g.n, rank, factor=0.2) for rank in ranks],
        scaling=[0.3 + 0.7 * e for e in range(len(ranks))],
        of_row=(of_row.sort()[0] if order == "sorted" else of_row).int().to(g.x.device),
        **more,
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
    b.check(gradients=False)
