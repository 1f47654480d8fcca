"""The cases of bench/cuda_operators.py over experts: our grouped operators, and torch expert by expert."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import qlora_ext

from .cuda_cases import BF16, OPS, RANK, SCALING, Call, Case, normal

NO_DROPOUT = (0.0, 0, None)


class Experts:
    """Stacked weights and adapters. They are larger than the L2 together, so one copy is enough."""

    def __init__(self, experts: int, n: int, k: int) -> None:
        self.n, self.k, self.experts = n, k, experts
        self.w4 = qlora_ext.NF4Weight.stack([qlora_ext.quantize_nf4(normal(n, k) * 0.02) for _ in range(experts)])
        self.lora_a, self.lora_b = normal(experts, RANK, k) * k**-0.5, normal(experts, n, RANK) * 0.02

    def cases(self, m: int) -> Iterator[Callable[[], Case]]:
        """Forward, dX and the adapters' gradients of m rows, drawn for the experts at random."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, self.experts, (m,), generator=generator).bincount(minlength=self.experts)
        ends = [0, *rows.cumsum(0).tolist()]
        slices = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
        offsets = rows.cumsum(0).cuda()
        for make in (self._forward, self._dx, self._dlora):
            yield lambda make=make: make(m, slices, offsets)

    def _case(self, name: str, m: int, ours: Call, each: Callable[[int, torch.dtype], Tensor], slices: list) -> Case:
        """`each(e, dtype)` is torch's result for one expert, from decoded weights."""

        def by_torch(dtype: torch.dtype) -> Tensor:
            return torch.cat([each(e, dtype) for e, rows in enumerate(slices) if rows.stop > rows.start])

        moved = self.w4.nbytes + 2 * m * (self.n + self.k)
        flops = 2.0 * m * (self.n * self.k + RANK * (self.n + self.k))
        calls = {"ours": ours, "dequantize + cuBLAS, expert by expert": lambda _: by_torch(BF16)}
        return Case(name, self.n, self.k, m, calls, lambda _: by_torch(torch.float32), moved, flops, 1)

    def _forward(self, m: int, slices: list, offsets: Tensor) -> Case:
        x = normal(m, self.k)
        args = x, offsets, *self.w4.operands(self.n, None, self.lora_a, self.lora_b, SCALING, 0.0, 0, None)

        def each(e: int, dtype: torch.dtype) -> Tensor:
            a, b, own = (t.to(dtype) for t in (self.lora_a[e], self.lora_b[e], x[slices[e]]))
            return (own @ self.w4.matrix(e).dequantize(dtype).T).addmm_(own @ a.T, b.T, alpha=SCALING)

        return self._case("grouped_linear_nf4", m, lambda _: OPS.grouped_linear_nf4(*args), each, slices)

    def _dx(self, m: int, slices: list, offsets: Tensor) -> Case:
        dy = normal(m, self.n)
        args = dy, offsets, *self.w4.operands(self.k, self.lora_a, self.lora_b, SCALING, 0.0, 0, None)

        def each(e: int, dtype: torch.dtype) -> Tensor:
            a, b, own = (t.to(dtype) for t in (self.lora_a[e], self.lora_b[e], dy[slices[e]]))
            return (own @ self.w4.matrix(e).dequantize(dtype)).addmm_(own @ b, a, alpha=SCALING)

        return self._case("grouped_linear_nf4_dx", m, lambda _: OPS.grouped_linear_nf4_dx(*args), each, slices)

    def _dlora(self, m: int, slices: list, offsets: Tensor) -> Case:
        x, dy = normal(m, self.k), normal(m, self.n)
        lora = self.lora_a, self.lora_b, SCALING, *NO_DROPOUT

        def by_torch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            a, b, xs, dys = (t.to(dtype) for t in (self.lora_a, self.lora_b, x, dy))
            da, db = torch.zeros_like(a), torch.zeros_like(b)
            for e, rows in enumerate(slices):
                da[e] = SCALING * (dys[rows] @ b[e]).T @ xs[rows]
                db[e] = SCALING * dys[rows].T @ (xs[rows] @ a[e].T)
            return da, db

        calls: dict[str, Call] = {
            "ours": lambda _: OPS.grouped_linear_nf4_dlora(dy, x, offsets, *lora),
            "bf16, expert by expert": lambda _: by_torch(BF16),
        }
        width = RANK * (self.n + self.k)
        moved = 2.0 * m * (self.n + self.k) + 4.0 * self.experts * width
        name = "grouped_linear_nf4_dlora"
        return Case(name, self.n, self.k, m, calls, lambda _: by_torch(torch.float32), moved, 4.0 * m * width, 1)
