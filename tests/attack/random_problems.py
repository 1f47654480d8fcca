"""Random problems of every operator on any device: sizes, layouts and operands, seeded by the problem's number."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import forms
import qlora_ext

assert qlora_ext  # the operators must be registered
OPS = torch.ops.qlora
KERNEL_VARIABLE = {"cpu": "QLORA_CPU_KERNEL", "cuda": "QLORA_CUDA_KERNEL"}
for _variable in KERNEL_VARIABLE.values():
    os.environ.setdefault(_variable, "")  # set before the first call, so that each call reads it
CPU_KERNELS = ["few_tokens_int", "few_tokens_bf16", "few_tokens_float"]
CPU_KERNELS += ["many_tokens_tiles", "many_tokens_bf16", "many_tokens_int", "many_tokens_float"]
CUDA_KERNELS = ["few_tokens", "tensor_cores", "sm75", "sm90", "sm100", "ragged", "exact", "gemm", "library"]
T4 = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)  # does not multiply bfloat16
DTYPES = [torch.float32, torch.float16] if T4 else [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
NESTED_BLOCK_SIZES = [256, 256, 1, 2, 3, 64, 100, 255, 1000, 4096, 1 << 20]
FORM_ARGUMENTS = ["code", "scale_table", "block_offsets", "offset_scale"]
RANKS = [None, None, 0, 1, 2, 3, 5, 8, 15, 16, 16, 17, 32, 33, 64, 100, 256]
MOST_PRODUCTS = 3_000_000  # of one problem; one problem in sixteen may have sixteen times as many
ROWS = [(0, 4), (1, 16), (5, 48), (17, 64), (49, 300), (301, 3000)]
MOST_FEEDBACK_COLUMNS = 200  # the oracle of encoding with feedback is a Python loop over the columns


class Draw:
    """The sizes and tensors of one problem."""

    def __init__(
        self, rng: random.Random, most_products: int = MOST_PRODUCTS, rows: Sequence[tuple[int, int]] = ROWS
    ) -> None:
        self.rng, self.most_products, self.ranges = rng, most_products, rows
        self.dtypes = [*DTYPES, *DTYPES, torch.float64]
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))
        self.said: list[str] = []
        self.form: dict[str, Any] = {}  # the last arguments of an operator on the weight that was drawn

    def say(self, **values: object) -> None:
        self.said += [f"{name}={value}" for name, value in values.items()]

    def choose(self, name: str, options: list[Any]) -> Any:
        value = self.rng.choice(options)
        self.say(**{name: value})
        return value

    def size(self, most: int) -> int:
        """0 (rarely) to ``most``, log-uniform; half of them are round numbers, or differ by one from such."""
        if self.rng.random() < 0.02:
            return 0
        value = int(math.exp(self.rng.uniform(0.0, math.log(max(most, 1) + 0.999))))
        if self.rng.random() < 0.5:
            step = self.rng.choice([2, 16, 32, 64, 128, 256])
            value = -(-value // step) * step + self.rng.choice([0, 0, 0, -1, 1])
        return max(0, min(value, most))

    def rows(self) -> int:
        return self.rng.randint(*self.rng.choice(self.ranges))

    def matrix(self, m: int) -> tuple[int, int]:
        """n and k, each up to 20000, with at most ``most_products`` products for m rows."""
        most = self.most_products * (16 if self.rng.random() < 1 / 16 else 1) // max(m, 1)
        first = self.size(min(20000, most))
        second = self.size(min(20000, most // max(first, 1)))
        return (first, second) if self.rng.random() < 0.5 else (second, first)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * factor).to(dtype)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)

    def packed(self, n: int, k: int, stack: tuple[int, ...] = ()) -> list[Any]:
        """The first six arguments of a weight. Those of a format other than NF4 are completed by ``form``."""
        block, nested_block = self.choose("block", BLOCK_SIZES), self.rng.choice(NESTED_BLOCK_SIZES)
        if self.rng.random() < 0.5:
            form = forms.FORMS[self.choose("form", list(forms.FORMS))]
            form = dataclasses.replace(form, block_size=block, nested_block_size=nested_block)
            w4 = forms.random_weight(form, (*stack, n, k), self.rng.getrandbits(60))
            *packed, code, table, offsets, unit = w4.operands()
            self.form = dict(zip(FORM_ARGUMENTS, (code, table, offsets, unit), strict=True))
            return packed
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

    def rank(self, name: str) -> int | None:
        """Whether there is an adapter; only a plain forward or dX has none."""
        rank = self.choose("rank", RANKS)
        return rank or 0 if name.endswith(("_with_h", "_with_g", "_dlora")) else rank

    def retained(self, lead: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[Tensor | None]:
        """h and g, each optional."""
        return [self.randn(*lead, rank, dtype=dtype) if self.rng.random() < 0.5 else None for _ in range(2)]

    def numbers(self) -> list[Any]:
        return [0.5, self.choose("dropout", [0.0, 0.0, 0.3, 1.0]), self.rng.getrandbits(63)]

    def lead(self, m: int) -> tuple[int, ...]:
        return (m // 2, 2) if m % 2 == 0 and self.rng.random() < 0.3 else (m,)


def linear(d: Draw, name: str) -> list[Any]:
    m = d.rows()
    n, k = d.matrix(m)
    dtype = d.choose("dtype", d.dtypes)
    if dtype == torch.float64:
        m = min(m, 40)
    rank = d.rank(name)
    d.say(m=m, n=n, k=k)
    lead = d.lead(m)
    if name == "linear_nf4_dlora":
        dy, x = d.randn(*lead, n, dtype=dtype), d.randn(*lead, k, dtype=dtype)
        return [dy, x, *d.lora(n, k, dtype, rank), *d.numbers(), None, *d.retained(lead, rank, dtype)]
    packed = d.packed(n, k)
    lora = d.lora(n, k, dtype, rank)
    if name.startswith("linear_nf4_dx"):
        return [d.randn(*lead, n, dtype=dtype), *packed, k, *lora, *d.numbers()]
    bias = d.randn(n, dtype=dtype) if d.rng.random() < 0.5 else None
    return [d.randn(*lead, k, dtype=dtype), *packed, n, bias, *lora, *d.numbers()]


def grouped(d: Draw, name: str) -> list[Any]:
    s, experts = d.rows(), d.rng.randint(0, 6)
    n, k = d.matrix(max(s, 16 * experts))
    dtype, rank = d.choose("dtype", DTYPES), d.rank(name)
    offsets = torch.tensor(sorted(d.rng.choice([0, s, d.rng.randint(0, s)]) for _ in range(experts)), dtype=torch.int64)
    d.say(s=s, n=n, k=k, offsets=offsets.tolist())
    stack = (experts,)
    if name == "grouped_linear_nf4_dlora":
        dy, x = d.randn(s, n, dtype=dtype), d.randn(s, k, dtype=dtype)
        return [dy, x, offsets, *d.lora(n, k, dtype, rank, stack), *d.numbers(), None, *d.retained((s,), rank, dtype)]
    packed = d.packed(n, k, stack)
    lora = d.lora(n, k, dtype, rank, stack)
    if name.startswith("grouped_linear_nf4_dx"):
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
        return [*d.packed(n, k), [n, k], d.choose("dtype", DTYPES)]
    nested_block = d.choose("nested", NESTED_BLOCK_SIZES)
    if name == "quantize_absmax":
        return [d.randn(n * k).abs(), nested_block]
    nested = -(-n * k // nested_block)
    return [d.bytes(n * k), d.randn(nested).abs(), d.randn(), nested_block]


def encode(d: Draw, name: str) -> list[Any]:
    n, k = d.matrix(d.rng.choice([30, 300]))
    feedback = name == "encode_nf4" and d.choose("feedback", [False, True])
    if feedback:
        k = min(k, MOST_FEEDBACK_COLUMNS)
    block = d.choose("block", BLOCK_SIZES)
    d.say(n=n, k=k)
    w = d.randn(n, k, dtype=d.choose("dtype", DTYPES), factor=10.0 ** d.rng.randint(-4, 3))
    if name == "search_absmax_nf4":
        return [w, d.randn(k).abs(), block]
    absmax = d.randn(-(-n * k // block)) * w.float().abs().max() if w.numel() else d.randn(0)
    if name == "encode_nf4_stochastic":
        return [w, absmax, block, d.rng.getrandbits(63)]
    if not feedback:
        return [w, absmax, block, None, None]
    factor = torch.triu(d.randn(k, k) * 0.05, 1) + torch.diag(d.randn(k).abs() + 0.5)
    return [w, absmax, block, factor, torch.randperm(k, generator=d.generator)]


def dense(d: Draw, name: str) -> list[Any]:
    m = d.rows()
    n, k = d.matrix(m)
    d.say(m=m, n=n, k=k)
    lead, weight = d.lead(m), d.randn(n, k, dtype=d.choose("dtype", [torch.bfloat16, torch.float16]))
    if name == "linear_dense_dx":
        return [d.randn(*lead, n), weight]
    return [d.randn(*lead, k), weight, d.randn(n) if d.rng.random() < 0.5 else None]


OPERATORS = {
    "search_absmax_nf4": encode,
    "encode_nf4": encode,
    "encode_nf4_stochastic": encode,
    "quantize_nf4": codec,
    "quantize_absmax": codec,
    "dequantize_absmax": codec,
    "dequantize_nf4": codec,
    "linear_nf4": linear,
    "linear_nf4_with_h": linear,
    "linear_nf4_dx": linear,
    "linear_nf4_dx_with_g": linear,
    "linear_nf4_dlora": linear,
    "grouped_linear_nf4": grouped,
    "grouped_linear_nf4_with_h": grouped,
    "grouped_linear_nf4_dx": grouped,
    "grouped_linear_nf4_dx_with_g": grouped,
    "grouped_linear_nf4_dlora": grouped,
}
ON_CPU = {"linear_dense": dense, "linear_dense_dx": dense}
# The few-token kernels have the most code.
OFTEN = ["linear_nf4", "linear_nf4_dx"] * 3


def draw(d: Draw, rng: random.Random, on_cpu: bool = False) -> tuple[str, list[Any]]:
    """An operator's name and its arguments, in the order of its schema."""
    operators = OPERATORS | ON_CPU if on_cpu else OPERATORS
    name = rng.choice([*operators, *OFTEN])
    arguments = operators[name](d, name)
    return name, in_order(name, by_name(name, arguments) | d.form) if d.form else arguments


def call_by_kernel(operator: Callable[..., Any], arguments: Sequence[Any], variable: str, kernel: str) -> Any:
    """The result with the kernel that ``variable`` forces, or None if that kernel does not accept the problem."""
    os.environ[variable] = kernel
    try:
        return operator(*arguments)
    except (ValueError, RuntimeError) as error:  # the latter is raised in a loop over experts
        if kernel and str(error).startswith(variable):
            return None
        raise


def _defaults(name: str) -> dict[str, Any]:
    """The arguments of an operator in the order of its schema, with their defaults, or None without a default."""
    return {argument.name: argument.default_value for argument in getattr(OPS, name).default._schema.arguments}


def by_name(name: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments by their names in the schema; omitted ones have defaults."""
    defaults = _defaults(name)
    return defaults | dict(zip(defaults, arguments, strict=False))


def in_order(name: str, arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments in the order of the schema; omitted ones have defaults."""
    return [arguments.get(argument, default) for argument, default in _defaults(name).items()]


def bits(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Each output's bytes."""
    outs = (out,) if isinstance(out, Tensor) else out
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in outs]
