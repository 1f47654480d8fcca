"""Problems with exact results, compared without tolerance: a child of test_exact.py.

Every operand is an integer times a power of two. Weights have the codes -1, 0 and 1 and scales that are powers of two,
so that a decoded weight is exact in every type. The magnitudes of a sum's terms add up to at most 2^24 of its smallest
unit, so that float32 sums them exactly in any order. h and g are representable in the type. The operators round
weights, h, g and the result once and sum in float32, so every kernel must give the exact result, rounded once.

Four kernels have additional errors. few_tokens_int rounds x to 15 bits of the largest value of its segment, and in dX
dy times the scale to 14 bits of the largest value of a tile. many_tokens_int rounds x to 13 bits or more of the largest
value of its piece, and in dX also scales and their products with dy to 15 bits. few_tokens_bf16 and CUDA's tensor cores
multiply codes by a factor that is not a power of two and divide by it in float32, which adds one float32 rounding.

Each problem runs with the default kernel and with every kernel that accepts it, forced by QLORA_CPU_KERNEL or
QLORA_CUDA_KERNEL.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle
import reference
from campaign import Problem, serve
from qlora_ext import _C
from random_problems import (
    BLOCK_SIZES,
    CPU_KERNELS,
    CUDA_KERNELS,
    DTYPES,
    KERNEL_VARIABLE,
    OPS,
    Draw,
    call_by_kernel,
    in_order,
)

SUMMED_EXACTLY = 2.0**24  # float32 represents every integer up to it
SIGNIFICAND = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float64: 24}
NESTED_CODES = torch.from_numpy(np.flatnonzero(np.isin(reference.DYNAMIC8, (0.0, 1.0)))).to(torch.uint8)
RANKS = [0, 1, 2, 5, 8, 15, 16, 16, 17, 33, 64]
MOST_PRODUCTS = {"cpu": 1_000_000, "cuda": 60_000}
ROWS = {"cpu": [(0, 4), (1, 16), (5, 48), (17, 64), (49, 300)], "cuda": [(0, 4), (1, 16), (5, 48), (17, 64), (49, 130)]}
INTEGERS, MANY_INTEGERS = "few_tokens_int", "many_tokens_int"
BF16_CODES, CHOSEN_ON_CUDA = "few_tokens_bf16", "chosen"
KERNELS = {"cpu": CPU_KERNELS, "cuda": CUDA_KERNELS}
Arguments = dict[str, Any]


class ExactDraw(Draw):
    """Operands that are integers times powers of two; ``x_unit`` and ``w_unit`` are the exponents of x, dy and of W."""

    def __init__(self, rng: random.Random, device: str) -> None:
        super().__init__(rng, MOST_PRODUCTS[device], ROWS[device])
        self.dtype = self.choose("dtype", [*DTYPES, *DTYPES, *([torch.float64] if device == "cpu" else [])])
        self.x_unit = rng.randint(-6, -3) if self.dtype == torch.float16 else rng.randint(-25, 25)
        self.w_unit = rng.randint(-6, -3)
        self.dropout_p = self.choose("dropout", [0.0, 0.0, 0.5, 0.75, 1.0])  # 1 / (1 - p) is a power of two
        # scaling * lora_a * lora_b has W's unit or twice W's unit.
        self.scaling = 2.0 ** rng.randint(-1, 1)
        self.a_unit = rng.randint(-2, 0)
        self.b_unit = self.w_unit - self.a_unit - int(math.log2(self.scaling)) + rng.randint(0, 1)

    def integers(self, most: int, density: float, *shape: int) -> Tensor:
        """Integers from -most to most; the fraction ``density`` of them is nonzero."""
        values = torch.randint(1, most + 1, shape, generator=self.generator)
        values *= torch.randint(0, 2, shape, generator=self.generator) * 2 - 1
        return values * (torch.rand(shape, generator=self.generator) < density)

    def scaled(self, integers: Tensor, unit: int) -> Tensor:
        return (integers.double() * 2.0**unit).to(self.dtype)

    def operand(self, *shape: int) -> Tensor:
        most = min(self.rng.choice([1, 3, 15, 255, 2047, 1 << 20]), (1 << SIGNIFICAND[self.dtype]) - 1)
        self.say(most=most)
        return self.scaled(self.integers(most, self.rng.choice([1.0, 1.0, 0.3]), *shape), self.x_unit)

    def density(self, terms: int) -> float:
        """The density of a sum's factors: all, some, or only a few."""
        return self.choose("density", [1.0, 0.3, 4 / max(terms, 1), 1 / max(terms, 1)])

    def weight(self, n: int, k: int, density: float, stack: tuple[int, ...]) -> Arguments:
        block, nested_block = self.choose("block", BLOCK_SIZES), self.rng.choice([1, 3, 64, 256])
        blocks = -(-n * k // block)
        codes = (7.5 + 7.5 * self.integers(1, density, *stack, n * k)).to(torch.uint8)  # 0, 7 and 15: -1, 0 and 1
        codes = torch.cat([codes, codes.new_full((*stack, n * k % 2), 7)], -1)
        a = {"packed": codes[..., 0::2] << 4 | codes[..., 1::2], "block_size": block, "nested_block_size": nested_block}
        unit = 2.0**self.w_unit
        if self.rng.random() < 0.5:
            exponents = torch.randint(0, 3, (*stack, blocks), generator=self.generator)
            return a | {"absmax": (2.0**exponents * unit).float(), "nested_absmax": None, "nested_offset": None}
        self.say(nested=nested_block)  # a scale is the offset, plus 0, 1 or 3 times the offset if the code is 1
        factors = torch.tensor([0.0, 1.0, 3.0])
        chosen = torch.randint(0, 3, (*stack, -(-blocks // nested_block)), generator=self.generator)
        a["absmax"] = NESTED_CODES[torch.randint(0, 2, (*stack, blocks), generator=self.generator)]
        return a | {"nested_absmax": factors[chosen] * unit, "nested_offset": torch.full(stack, unit)}

    def adapter(self, n: int, k: int, stack: tuple[int, ...], wanted: bool) -> Arguments:
        numbers = {"scaling": self.scaling, "dropout_p": self.dropout_p, "seed": self.rng.getrandbits(63)}
        if not wanted:
            return numbers | {"lora_a": None, "lora_b": None}
        rank = self.choose("rank", RANKS)
        lora_a = self.scaled(self.integers(2, 3 / max(k, 1), *stack, rank, k), self.a_unit)
        lora_b = self.scaled(self.integers(2, 3 / max(n, 1), *stack, n, rank), self.b_unit)
        return numbers | {"lora_a": lora_a, "lora_b": lora_b}


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounds once; float64 is not rounded."""
    return torch.from_numpy(np.asarray(x, np.float64)).to(dtype).double().numpy()


def single(t: Tensor, dim: int, which: Tensor, unit: int) -> None:
    """Keeps one element, a power of two, in each slice ``which`` along ``dim``."""
    for i in which.tolist():
        slice_ = t.select(dim, i)
        slice_.zero_()
        slice_[i % len(slice_)] = 2.0**unit


def make_representable(d: ExactDraw, a: Arguments, experts: int | None) -> None:
    """Zeroes elements of lora_a and lora_b until every h and g is representable in the type."""
    for e in range(experts or 1):
        part = a if experts is None else a | {key: a[key][e] for key in ("lora_a", "lora_b")}
        h, g = oracle.low_rank(part, oracle.identity)
        for made, name, dim, unit in ((h, "lora_a", 0, d.a_unit), (g, "lora_b", 1, d.b_unit)):
            if made is not None and part[name].shape[1 - dim]:
                wrong = torch.from_numpy((rounded(made, d.dtype) != made).any(0)).nonzero().flatten()
                single(part[name], dim, wrong, unit)


def linear_arguments(d: ExactDraw, name: str) -> tuple[Arguments, int | None]:
    """Arguments of a grouped operator, and the number of experts."""
    m, experts = d.rows(), d.rng.randint(1, 4) if name.startswith("grouped") else None
    n, k = d.matrix(max(m, 16 * (experts or 1)))
    d.say(m=m, n=n, k=k)
    stack, own = (() if experts is None else (experts,)), name.removeprefix("grouped_")
    a: Arguments = {}
    if experts is not None:
        a["offsets"] = torch.tensor(sorted(d.rng.choice([0, m, d.rng.randint(0, m)]) for _ in range(experts)))
        d.say(offsets=a["offsets"].tolist())
    if not own.startswith("linear_nf4_dx"):
        a["x"] = d.operand(m, k)
    if own.startswith(("linear_nf4_dx", "linear_nf4_dlora")):
        a["dy"] = d.operand(m, n)
    if not own.endswith("_dlora"):
        forward = "x" in a
        a |= d.weight(n, k, d.density(k if forward else n), stack)
        a |= {"out_features": n} if forward else {"in_features": k}
        if forward:
            a["bias"] = None if d.rng.random() < 0.5 else d.scaled(d.integers(100, 1.0, *stack, n), d.x_unit + d.w_unit)
    must = own.endswith(("_with_h", "_with_g", "_dlora"))
    a |= d.adapter(n, k, stack, must or d.rng.random() < 0.7)
    return a, experts


def answers(name: str, one: Any, a: Arguments, *of: oracle.Of) -> list[np.ndarray]:
    """The values of ``one``, a function of a single weight, for each output."""
    if not name.startswith("grouped"):
        return one(a, *of)
    shapes = getattr(OPS, name)(**{key: v.to("meta") if isinstance(v, Tensor) else v for key, v in a.items()})
    return oracle.grouped(one, a, [shapes] if isinstance(shapes, Tensor) else shapes, *of)


def units(d: ExactDraw, own: str) -> list[int]:
    """The exponent of each output's unit."""
    scaling = int(math.log2(d.scaling))
    h, g = d.x_unit + d.a_unit + scaling, d.x_unit + d.b_unit + scaling
    if own == "linear_nf4_dlora":
        return [g + d.x_unit, h + d.x_unit]
    return [d.x_unit + d.w_unit, h if "with_h" in own else g]


def linear(d: ExactDraw, name: str) -> Arguments:
    a, experts = linear_arguments(d, name)
    own = name.removeprefix("grouped_")
    while True:
        if a["lora_a"] is not None:
            make_representable(d, a, experts)
        sizes = answers(name, oracle.ORACLE[own], a, np.abs)
        if all(np.max(s, initial=0) <= SUMMED_EXACTLY * 2.0**u for s, u in zip(sizes, units(d, own), strict=False)):
            break
        for key in {"x", "dy"} & a.keys():
            a[key] = d.scaled((a[key].double() * 2.0 ** -(d.x_unit + 2)).trunc(), d.x_unit)
    if own == "linear_nf4_dlora":
        h, g = retained(name, a)
        a["h"], a["g"] = (t if d.rng.random() < 0.5 else None for t in (h, g))
    return a


def retained(name: str, a: Arguments) -> tuple[Tensor, Tensor]:
    """h and g of all rows."""

    def both(part: Arguments, of: oracle.Of = oracle.identity) -> list[np.ndarray]:
        return list(oracle.low_rank(part, of))

    shape = torch.empty(*a["x"].shape[:-1], a["lora_a"].shape[-2])
    made = oracle.grouped(both, a, [shape, shape]) if name.startswith("grouped") else both(a)
    h, g = (torch.from_numpy(t).to(a["x"].dtype) for t in made)
    return h, g


# The error bound of a kernel before its result is rounded, for a single weight.


def integers_forward(a: Arguments, largest: int = 32639) -> list[np.ndarray]:
    x = np.abs(oracle.rows(a["x"]))
    w = np.abs(oracle.decoded(a, a["out_features"], x.shape[1]).astype(np.float64))
    step = x.max(1, initial=0.0) / largest
    return [step[:, None] / 2 * w.sum(1) + 2.0**-20 * x @ w.T]


def many_integers_forward(a: Arguments) -> list[np.ndarray]:
    return integers_forward(a, 4095)


def integers_dx(a: Arguments) -> list[np.ndarray]:
    dy = np.abs(oracle.rows(a["dy"]))
    w = np.abs(oracle.decoded(a, dy.shape[1], a["in_features"]).astype(np.float64))
    step = dy.max(1, initial=0.0) * np.abs(oracle.scales(a)).max(initial=0.0) / 16383
    return [step[:, None] / 2 * (w > 0).sum(0) + 2.0**-20 * dy @ w]


def many_integers_dx(a: Arguments) -> list[np.ndarray]:
    dy = np.abs(oracle.rows(a["dy"]))
    w = np.abs(oracle.decoded(a, dy.shape[1], a["in_features"]).astype(np.float64))
    largest = dy.max(1, initial=0.0) * np.abs(oracle.scales(a)).max(initial=0.0)
    return [largest[:, None] * (1 / 4095 + 1 / 65536) * (w > 0).sum(0) + 2.0**-20 * dy @ w]


def scaled_codes_forward(a: Arguments) -> list[np.ndarray]:
    """The error of scaling codes by a factor close to representable numbers, by which sums or scales are divided."""
    x = np.abs(oracle.rows(a["x"]))
    w = np.abs(oracle.decoded(a, a["out_features"], x.shape[1]).astype(np.float64))
    return [2.0**-22 * x @ w.T]


def chosen_forward(a: Arguments) -> list[np.ndarray]:
    """The kernel that CUDA chooses: tensor cores for 16-bit types and regular shapes. The other kernels are exact."""
    regular = a["x"].dtype != torch.float32 and a["x"].shape[-1] % 64 == 0 and a["block_size"] >= 64
    return [error if regular else 0 * error for error in scaled_codes_forward(a)]


ERRORS = {
    ("linear_nf4", CHOSEN_ON_CUDA): chosen_forward,
    **{("linear_nf4", kernel): scaled_codes_forward for kernel in ("few_tokens", "tensor_cores", "sm75", "sm90")},
    ("linear_nf4", INTEGERS): integers_forward,
    ("linear_nf4", MANY_INTEGERS): many_integers_forward,
    ("linear_nf4_dx", INTEGERS): integers_dx,
    ("linear_nf4_dx", MANY_INTEGERS): many_integers_dx,
    ("linear_nf4", BF16_CODES): scaled_codes_forward,
}


def operator_of(name: str) -> str:
    """The operator whose kernels it uses."""
    return name.removeprefix("grouped_").removesuffix("_with_h").removesuffix("_with_g")


def default_kernel(name: str, a: Arguments) -> str:
    """The CPU's bound: that of products of integers if they compute the call, or one of its experts."""
    given = a["x"] if "x" in a else a["dy"]
    n, k = a.get("out_features", given.shape[-1]), a.get("in_features", given.shape[-1])
    ends = a["offsets"].tolist() if "offsets" in a else [len(given)]
    kernels = [
        _C.choose(operator_of(name), str(given.dtype)[6:], end - begin, n, k, a.get("block_size", 64))[0]
        for begin, end in zip([0, *ends], ends, strict=False)
    ]
    return next((kernel for kernel in (MANY_INTEGERS, INTEGERS) if kernel in kernels), kernels[0])


def errors(name: str, kernel: str, a: Arguments, expected: list[np.ndarray]) -> list[np.ndarray]:
    """The error bound of each output: zero except for the first output of the kernels with additional errors."""
    none = [np.zeros_like(e) for e in expected]
    one = ERRORS.get((operator_of(name), kernel))
    if one is None:
        return none
    if not name.startswith("grouped"):
        return [one(a)[0], *none[1:]]
    return [*oracle.grouped(one, a, [torch.empty(expected[0].shape)]), *none[1:]]


def compare(name: str, kernel: str, a: Arguments, out: Any, expected: list[np.ndarray]) -> str | None:
    """A description of the error in ``out``, the output of the kernel of this name."""
    dtype = (a["x"] if "x" in a else a["dy"]).dtype
    allowed = errors(name, kernel, a, expected)
    outs = (out,) if isinstance(out, Tensor) else out
    for i, (got, answer, error) in enumerate(zip(outs, expected, allowed, strict=True)):
        values = got.double().numpy().reshape(answer.shape)
        low, high = rounded(answer - error, dtype), rounded(answer + error, dtype)
        wrong = ~((values >= low) & (values <= high))
        if wrong.any():
            at = tuple(int(j) for j in np.argwhere(wrong)[0])
            wanted = f"{low[at]}" if low[at] == high[at] else f"{low[at]} to {high[at]}"
            return (
                f"{kernel}, output {i}: {wrong.sum()} of {wrong.size} not exact, the first {list(at)}: "
                f"{values[at]} instead of {wanted}"
            )
    return None


def exact_linear(d: ExactDraw, name: str, device: str) -> Problem:
    a = linear(d, name)
    own = name.removeprefix("grouped_")

    def run() -> str | None:
        moved = [v.to(device) if isinstance(v, Tensor) else v for v in in_order(name, a)]
        expected = answers(name, oracle.ORACLE[own], a)
        by_default = default_kernel(name, a) if device == "cpu" else CHOSEN_ON_CUDA
        for kernel in ["", *KERNELS[device]]:
            out = call_by_kernel(getattr(OPS, name), moved, KERNEL_VARIABLE[device], kernel)
            if out is None:
                continue
            back = out.cpu() if isinstance(out, Tensor) else tuple(t.cpu() for t in out)
            if wrong := compare(name, kernel or by_default, a, back, expected):
                return wrong
        return None

    return f"{name} {' '.join(d.said)}", run


def exact_codec(d: ExactDraw, device: str) -> Problem:
    """Every encoder must reproduce weights with the codes -1, 0 and 1, and their scales, exactly."""
    n, k = d.matrix(30)
    d.say(n=n, k=k)
    a = d.weight(n, k, d.density(k), ())
    dtype = d.dtype if d.dtype != torch.float64 else torch.float32
    seed = d.rng.getrandbits(63)

    def run() -> str | None:
        packed = [a[key] for key in ("packed", "absmax", "nested_absmax", "nested_offset")]
        on_device = [None if t is None else t.to(device) for t in packed]
        block, nested_block = a["block_size"], a["nested_block_size"]
        w = OPS.dequantize_nf4(*on_device, block, nested_block, [n, k], dtype)
        expected = oracle.decoded(a, n, k)
        if not np.array_equal(w.cpu().double().numpy(), expected):
            return "dequantize_nf4: not exact"
        plain, absmax = OPS.quantize_nf4(w, block)
        ways = {"quantize_nf4": plain, "encode_nf4": OPS.encode_nf4(w, absmax, block)}
        ways["encode_nf4_stochastic"] = OPS.encode_nf4_stochastic(w, absmax, block, seed)
        ways["search_absmax_nf4"] = plain
        scales = {"search_absmax_nf4": OPS.search_absmax_nf4(w, torch.ones(k, device=device), block)}
        for way, codes in ways.items():
            back = OPS.dequantize_nf4(codes, scales.get(way, absmax), None, None, block, 256, [n, k], torch.float32)
            if not np.array_equal(back.cpu().double().numpy(), expected):
                return f"{way}: not exact"
        return None

    return f"codec {' '.join(d.said)}", run


LINEAR = ["linear_nf4", "linear_nf4_with_h", "linear_nf4_dx", "linear_nf4_dx_with_g", "linear_nf4_dlora"]
# The few-token kernels have the most code.
KINDS = [*LINEAR, *LINEAR[:4], *(f"grouped_{name}" for name in LINEAR), "codec"]


def exact(rng: random.Random, device: str) -> Problem:
    d, kind = ExactDraw(rng, device), rng.choice(KINDS)
    return exact_codec(d, device) if kind == "codec" else exact_linear(d, kind, device)


if __name__ == "__main__":
    serve({device: lambda rng, device=device: exact(rng, device) for device in KERNELS})
