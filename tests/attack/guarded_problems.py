"""Random problems of every operator, on fenced inputs: a child of test_guard_pages.py.

Each problem runs three times: on ordinary tensors, on tensors that end where mapped memory ends, and on tensors that
begin where it begins, with other numbers of threads and other bytes in fresh memory. The bits must be the same.
"""

from __future__ import annotations

import ctypes
import math
import random
from typing import Any

import torch
from torch import Tensor

import qlora_ext
from campaign import Problem, serve
from fences import fenced, fill_new_memory

assert qlora_ext  # the operators must be registered
OPS = torch.ops.qlora
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
NESTED_BLOCK_SIZES = [256, 256, 1, 2, 3, 64, 100, 255, 1000, 4096, 1 << 20]
RANKS = [None, None, 0, 1, 2, 3, 5, 8, 15, 16, 16, 17, 32, 33, 64, 100, 256]
MOST_PRODUCTS = 3_000_000  # of a problem, but for one in sixteen, which may have sixteen times as many


class Draw:
    """The sizes and tensors of one problem."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))
        self.said: list[str] = []

    def say(self, **values: object) -> None:
        self.said += [f"{name}={value}" for name, value in values.items()]

    def choose(self, name: str, options: list[Any]) -> Any:
        value = self.rng.choice(options)
        self.say(**{name: value})
        return value

    def size(self, most: int) -> int:
        """0 (seldom) to ``most``, every order of magnitude as likely; half of them round, or one off."""
        if self.rng.random() < 0.02:
            return 0
        value = int(math.exp(self.rng.uniform(0.0, math.log(max(most, 1) + 0.999))))
        if self.rng.random() < 0.5:
            step = self.rng.choice([2, 16, 32, 64, 128, 256])
            value = -(-value // step) * step + self.rng.choice([0, 0, 0, -1, 1])
        return max(0, min(value, most))

    def rows(self) -> int:
        low, high = self.rng.choice([(0, 4), (1, 16), (5, 48), (17, 64), (49, 300), (301, 3000)])
        return self.rng.randint(low, high)

    def matrix(self, m: int) -> tuple[int, int]:
        """n and k, either of them up to 20000, of no more than MOST_PRODUCTS products with m rows."""
        most = MOST_PRODUCTS * (16 if self.rng.random() < 1 / 16 else 1) // max(m, 1)
        first = self.size(min(20000, most))
        second = self.size(min(20000, most // max(first, 1)))
        return (first, second) if self.rng.random() < 0.5 else (second, first)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * factor).to(dtype)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)

    def packed_args(self, n: int, k: int, stack: tuple[int, ...] = ()) -> list[Any]:
        block, nested_block = self.choose("block", BLOCK_SIZES), self.rng.choice(NESTED_BLOCK_SIZES)
        blocks = -(-n * k // block)
        packed = self.bytes(*stack, (n * k + 1) // 2)
        if self.rng.random() < 0.4:
            return [packed, self.randn(*stack, blocks).abs() * 0.05, None, None, block, nested_block]
        self.say(nested=nested_block)
        nested_absmax = self.randn(*stack, -(-blocks // nested_block)).abs() * 0.01
        return [packed, self.bytes(*stack, blocks), nested_absmax, self.randn(*stack) + 0.05, block, nested_block]

    def lora(self, n: int, k: int, dtype: torch.dtype, rank: int | None, stack: tuple[int, ...] = ()) -> list[Any]:
        if rank is None:
            return [None, None]
        a = self.randn(*stack, rank, k, dtype=dtype, factor=max(k, 1) ** -0.5)
        return [a, self.randn(*stack, n, rank, dtype=dtype, factor=0.2)]

    def numbers(self) -> list[Any]:
        return [0.5, self.choose("dropout", [0.0, 0.0, 0.3, 1.0]), self.rng.getrandbits(63)]

    def lead(self, m: int) -> tuple[int, ...]:
        return (m // 2, 2) if m % 2 == 0 and self.rng.random() < 0.3 else (m,)


def linear(d: Draw, name: str) -> list[Any]:
    m = d.rows()
    n, k = d.matrix(m)
    dtype = d.choose("dtype", [*DTYPES, *DTYPES, torch.float64])
    if dtype == torch.float64:
        m = min(m, 40)
    rank = d.choose("rank", RANKS)
    d.say(m=m, n=n, k=k)
    lead = d.lead(m)
    if name == "linear_nf4_dlora":
        dy, x = d.randn(*lead, n, dtype=dtype), d.randn(*lead, k, dtype=dtype)
        return [dy, x, *d.lora(n, k, dtype, rank or 0), *d.numbers()]
    packed = d.packed_args(n, k)
    lora = d.lora(n, k, dtype, rank)
    if name == "linear_nf4_dx":
        return [d.randn(*lead, n, dtype=dtype), *packed, k, *lora, *d.numbers()]
    bias = d.randn(n, dtype=dtype) if d.rng.random() < 0.5 else None
    return [d.randn(*lead, k, dtype=dtype), *packed, n, bias, *lora, *d.numbers()]


def grouped(d: Draw, name: str) -> list[Any]:
    s, experts = d.rows(), d.rng.randint(0, 6)
    n, k = d.matrix(max(s, 16 * experts))
    dtype, rank = d.choose("dtype", DTYPES), d.choose("rank", RANKS)
    offsets = torch.tensor(sorted(d.rng.choice([0, s, d.rng.randint(0, s)]) for _ in range(experts)), dtype=torch.int64)
    d.say(s=s, n=n, k=k, offsets=offsets.tolist())
    stack = (experts,)
    if name == "grouped_linear_nf4_dlora":
        dy, x = d.randn(s, n, dtype=dtype), d.randn(s, k, dtype=dtype)
        return [dy, x, offsets, *d.lora(n, k, dtype, rank or 0, stack), *d.numbers()]
    packed = d.packed_args(n, k, stack)
    lora = d.lora(n, k, dtype, rank, stack)
    if name == "grouped_linear_nf4_dx":
        return [d.randn(s, n, dtype=dtype), offsets, *packed, k, *lora, *d.numbers()]
    bias = d.randn(experts, n, dtype=dtype) if d.rng.random() < 0.5 else None
    return [d.randn(s, k, dtype=dtype), offsets, *packed, n, bias, *lora, *d.numbers()]


def codec(d: Draw, name: str) -> list[Any]:
    n, k = d.matrix(d.rng.choice([1, 10, 100]))
    d.say(n=n, k=k)
    if name == "quantize_nf4":
        values = d.randn(n, k, dtype=d.choose("dtype", DTYPES), factor=10.0 ** d.rng.randint(-4, 3))
        return [values, d.choose("block", BLOCK_SIZES)]
    if name == "dequantize_nf4":
        return [*d.packed_args(n, k), [n, k], d.choose("dtype", DTYPES)]
    nested_block = d.choose("nested", NESTED_BLOCK_SIZES)
    if name == "quantize_absmax":
        return [d.randn(n * k).abs(), nested_block]
    nested = -(-n * k // nested_block)
    return [d.bytes(n * k), d.randn(nested).abs(), d.randn(), nested_block]


OPERATORS = {
    "quantize_nf4": codec,
    "quantize_absmax": codec,
    "dequantize_absmax": codec,
    "dequantize_nf4": codec,
    "linear_nf4": linear,
    "linear_nf4_dx": linear,
    "linear_nf4_dlora": linear,
    "grouped_linear_nf4": grouped,
    "grouped_linear_nf4_dx": grouped,
    "grouped_linear_nf4_dlora": grouped,
}
# The few-token kernels have the most code to go wrong.
OFTEN = ["linear_nf4", "linear_nf4_dx"] * 3


def bits(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    outs = (out,) if isinstance(out, Tensor) else out
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in outs]


def guarded(rng: random.Random) -> Problem:
    d = Draw(rng)
    name = rng.choice([*OPERATORS, *OFTEN])
    arguments = OPERATORS[name](d, name)
    operator = getattr(OPS, name)

    def run() -> str | None:
        torch.set_num_threads(rng.randint(1, 3))
        fill_new_memory(0x5A)
        expected = bits(operator(*arguments))
        for at_end in (True, False):
            torch.set_num_threads(rng.randint(1, 3))
            fill_new_memory(0xA7 if at_end else 0)
            with fenced(arguments, at_end) as moved:
                got = bits(operator(*moved))
            for i, (a, b) in enumerate(zip(expected, got, strict=True)):
                if not torch.equal(a, b):
                    place = int((a != b).nonzero()[0])
                    return f"output {i}: other bits on other memory, from byte {place} of {a.numel()}; at_end={at_end}"
        return None

    return f"{name} {' '.join(d.said)}", run


def broken(how: str) -> Problem:
    """What the fences are for: a byte read behind a tensor, one before it, a write to it, and one that is missing."""

    def run() -> str | None:
        if how == "unwritten":
            fill_new_memory(0x5A)
            first = bits(torch.empty(5000))[0].clone()
            fill_new_memory(0xA7)
            return None if torch.equal(first, bits(torch.empty(5000))[0]) else "an unwritten output shows"
        with fenced([torch.zeros(1000)], at_end=how == "behind") as (t,):
            if how == "write":
                t.zero_()
            else:
                at = t.data_ptr() + (t.nbytes if how == "behind" else -1)
                return f"read {ctypes.c_char.from_address(at).value!r}"
        return None

    return how, run


BREAKS = ["behind", "before", "write", "unwritten"]

if __name__ == "__main__":
    serve({"guarded": guarded, **{how: lambda _, how=how: broken(how) for how in BREAKS}})
