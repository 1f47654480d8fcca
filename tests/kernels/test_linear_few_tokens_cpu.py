"""The CPU kernels for few tokens, compared with the float64 oracle on every instruction set of this machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import accuracy
import isas
import qlora_ext
import reference
from accuracy import assert_accurate
from samples import to_f64

test_on = isas.test_on
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass
class Case:
    m: int
    n: int
    k: int
    dtype: str = "bf16"
    rank: int = 16
    block: int = 64
    nested: bool = True
    bias: bool = True
    dropout: float = 0.0

    def __str__(self) -> str:
        scales = "nested" if self.nested else "plain"
        drop = f"-drop{self.dropout}" if self.dropout else ""
        return f"{self.m}x{self.n}x{self.k}-{self.dtype}-r{self.rank}-b{self.block}-{scales}{drop}"


CASES = [
    *(Case(m, 96, 320, dtype) for m in range(1, 17) for dtype in DTYPES),
    # K: full chunks, half chunks, short lanes, bytes that span rows; N: tails of a tile
    *(Case(m, n, k) for m in (1, 3, 16) for n, k in ((33, 576), (48, 64), (257, 96), (40, 32), (64, 4096), (19, 2112))),
    *(
        Case(m, n, k, dtype)
        for dtype in DTYPES
        for m in (1, 5, 16)
        for n, k in ((130, 100), (77, 333), (61, 1030), (150, 33), (90, 7), (1, 2049), (1, 192), (513, 1))
    ),
    *(Case(m, n, k, "f32") for m in (1, 3, 8) for n, k in ((130, 100), (77, 333), (61, 1030), (64, 4097))),
    *(Case(2, 64, k, dtype, block=b) for dtype in DTYPES for b in reference.BLOCK_SIZES for k in (512, 1000, 4097)),
    *(Case(4, 80, k, dtype, nested=False) for dtype in DTYPES for k in (256, 300, 515)),
    *(Case(m, 100, 384, dtype, rank=r) for dtype in DTYPES for m in (1, 7) for r in (0, 1, 5, 64, 256)),
    *(Case(3, 72, k, dtype, dropout=0.3) for dtype in DTYPES for k in (256, 131)),
    Case(9, 31, 9000, "f16", bias=False, rank=0),
    # dx: rows of W in several slabs, and columns in several ranges
    *(Case(m, 1100, 640, dtype) for m in (1, 5, 16) for dtype in ("bf16", "f16")),
    *(Case(16, 530, k, "f16", dropout=0.3) for k in (17000, 17024)),
]


@dataclass
class Problem:
    case: Case
    packed: tuple
    w: np.ndarray
    x: torch.Tensor
    dy: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    scaling: float = 0.75
    seed: int = 1234567890123

    @classmethod
    def make(cls, case: Case) -> Problem:
        dtype = DTYPES[case.dtype]
        g = torch.Generator().manual_seed(case.m * 1000003 + case.n * 1009 + case.k)
        numel = case.n * case.k
        w32 = torch.randn(case.n, case.k, generator=g) * (1 + torch.rand(case.n, 1, generator=g)) / case.k**0.5
        packed, absmax = reference.quantize_nf4(w32.numpy(), case.block)
        scales = (torch.from_numpy(absmax), None, None)
        if case.nested:
            codes, nested, offset = reference.quantize_absmax(absmax)
            absmax = reference.dequantize_absmax(codes, nested, offset)
            scales = (torch.from_numpy(codes), torch.from_numpy(nested), torch.tensor(offset))
        w = reference.dequantize_nf4(packed, absmax, numel, case.block).reshape(case.n, case.k)
        shape = (case.n, case.k // 2) if case.k % 2 == 0 else (-1,)

        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, generator=g) * scale).to(dtype)

        return cls(
            case,
            (torch.from_numpy(packed).reshape(shape), *scales, case.block, 256),
            w.astype(np.float64),
            random(case.m, case.k),
            random(case.m, case.n),
            random(case.n) if case.bias else None,
            random(case.rank, case.k, scale=case.k**-0.5) if case.rank else None,
            random(case.n, case.rank, scale=0.3) if case.rank else None,
        )

    def lora_args(self) -> tuple:
        return self.lora_a, self.lora_b, self.scaling, self.case.dropout, self.seed

    def forward(self) -> torch.Tensor:
        return torch.ops.qlora.linear_nf4(self.x, *self.packed, self.case.n, self.bias, *self.lora_args())

    def dx(self) -> torch.Tensor:
        return torch.ops.qlora.linear_nf4_dx(self.dy, *self.packed, self.case.k, *self.lora_args())

    def forward_accuracy(self) -> accuracy.Expected:
        return accuracy.forward(to_f64(self.x), self.w, *self.wide(self.bias), *self.lora64(), self.x.dtype)

    def dx_accuracy(self) -> accuracy.Expected:
        return accuracy.dx(to_f64(self.dy), self.w, *self.lora64(), self.x.dtype)

    def lora64(self) -> tuple:
        return *self.wide(self.lora_a, self.lora_b), *self.lora_args()[2:]

    def wide(self, *tensors: torch.Tensor | None) -> list[np.ndarray | None]:
        return [None if t is None else to_f64(t) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 700, 1024), (3, 1300, 576), (6, 513, 1027), (16, 300, 2112)], ids=str)
def test_same_bits_for_any_thread_count(shape: tuple[int, int, int], dtype: str) -> None:
    p = Problem.make(Case(*shape, dtype, rank=24, dropout=0.1))
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs.append((p.forward(), p.dx()))
    finally:
        torch.set_num_threads(before)
    for y, dx in outputs[1:]:
        assert torch.equal(y, outputs[0][0])
        assert torch.equal(dx, outputs[0][1])


@pytest.mark.parametrize("nested", [256, 96])
@pytest.mark.parametrize("m", [1, 7])
def test_nested_scales_are_those_of_the_format(m: int, nested: int) -> None:
    """Where the inner loop decodes nested scales, it computes the same bits as with the decoded scales. Rows that are
    summed in float32 lie among the others, and nested blocks begin within rows."""
    n, k = 150, 576
    w = torch.randn(n, k)
    w[70], w[133, 5:] = 0.0, 0.0
    weight = qlora_ext.quantize_nf4(w, nested_block_size=nested)
    absmax = torch.ops.qlora.dequantize_absmax(weight.absmax, weight.nested_absmax, weight.nested_offset, nested)
    x = torch.randn(m, k).to(torch.bfloat16)
    none = (n, None, None, None, 1.0, 0.0, 0, None)
    y = torch.ops.qlora.linear_nf4(x, *weight.operands(*none))
    assert torch.equal(y, torch.ops.qlora.linear_nf4(x, weight.packed, absmax, None, None, 64, 256, *none))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_stay_in_their_rows(dtype: str) -> None:
    p = Problem.make(Case(5, 96, 1100, dtype, rank=0))
    clean_y, clean_dx = p.forward(), p.dx()
    p.x[1, 700], p.x[3, 0] = float("nan"), float("inf")
    p.dy[0, 5], p.dy[4, 95] = float("-inf"), float("nan")
    y, dx = p.forward(), p.dx()
    assert not torch.isfinite(y[[1, 3]]).any()
    assert torch.equal(y[[0, 2, 4]], clean_y[[0, 2, 4]])
    assert torch.isnan(dx[4]).all()
    assert not torch.isfinite(dx[0]).all()
    assert torch.equal(dx[1:4], clean_dx[1:4])


def test_dx_of_rows_of_very_different_size() -> None:
    """Large gradients with small rows of W and vice versa: neither determines how the other is rounded."""
    n, k, m = 32, 256, 2
    size = torch.where(torch.arange(n) % 2 == 0, 1e3, 1e-3)
    weight = qlora_ext.quantize_nf4(torch.randn(n, k) * size[:, None], double_quant=False)
    dy = (torch.randn(m, n) / size).to(torch.bfloat16)
    out = torch.ops.qlora.linear_nf4_dx(dy, *weight.operands(k, None, None, 1.0, 0.0, 0, None))
    w = to_f64(weight.dequantize())
    assert_accurate(out, accuracy.dx(to_f64(dy), w, None, None, 1.0, 0.0, 0, dy.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case) -> None:
    p = Problem.make(case)
    assert_accurate(p.forward(), p.forward_accuracy())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dx(case: Case) -> None:
    p = Problem.make(case)
    assert_accurate(p.dx(), p.dx_accuracy())
