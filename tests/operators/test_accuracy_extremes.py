"""The accuracy rules per token and per output for operands of all sizes: outliers, heavy tails, tiny and huge values.

The forward and dx are the same problem: tokens [T, I] times a matrix [I, O], which is W transposed or W itself. Tokens
are independent of each other, so that one reference serves any number of tokens per call.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import accuracy
import isas
import qlora_ext
import reference
from grouped_samples import GroupedSample
from qlora_ext import _C
from samples import DTYPES, to_f64

OPS = torch.ops.qlora
HALF = [torch.bfloat16, torch.float16]
TOKENS = 300
ATTACK = int(os.environ.get("QLORA_ATTACK", "1"))  # number of seeds of the slow sweep
test_on = isas.test_on


@dataclasses.dataclass
class Problem:
    """x [T, I] and a packed W, [O, I] for the forward and [I, O] for dx; the result is [T, O]."""

    x: Tensor
    w4: qlora_ext.NF4Weight
    w: np.ndarray
    forward: bool
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None

    def run(self, x: Tensor) -> Tensor:
        lora = self.lora_a, self.lora_b, 0.5, 0.0, 0
        n, k = self.w4.shape
        if self.forward:
            return OPS.linear_nf4(x, *self.w4.operands(n, self.bias, *lora, None))
        return OPS.linear_nf4_dx(x, *self.w4.operands(k, *lora, None))

    def in_groups(self, m: int, tokens: int) -> Tensor:
        return torch.cat([self.run(part) for part in self.x[:tokens].split(m)])

    def expected(self) -> accuracy.Expected:
        a, b, bias = (None if t is None else to_f64(t) for t in (self.lora_a, self.lora_b, self.bias))
        lora = a, b, 0.5, 0.0, 0, self.x.dtype
        if self.forward:
            return accuracy.forward(to_f64(self.x), self.w, bias, *lora)
        return accuracy.dx(to_f64(self.x), self.w, *lora)


def problem(
    x: Tensor, w: Tensor, dtype: torch.dtype, forward: bool, block: int = 64, nested: bool = True, rank: int = 0
) -> Problem:
    """x [T, I] and w [O, I] in float64."""
    dense = (w if forward else w.T).float().contiguous()
    w4 = qlora_ext.quantize_nf4(dense, block, nested)
    absmax = w4.absmax.numpy()
    if nested:
        absmax = reference.dequantize_absmax(absmax, w4.nested_absmax.numpy(), np.float32(w4.nested_offset.item()), 256)
    decoded = reference.dequantize_nf4(w4.packed.numpy(), absmax, dense.numel(), block).reshape(dense.shape)
    n, k = dense.shape
    a = b = bias = None
    if rank:
        g = torch.Generator().manual_seed(rank)
        a = (torch.randn(rank, k, generator=g) * k**-0.5).to(dtype)
        b, bias = (torch.randn(n, rank, generator=g) * 0.2).to(dtype), torch.randn(n, generator=g).to(dtype)
    return Problem(x.to(dtype), w4, decoded.astype(np.float64), forward, a, b, bias if forward else None)


# A scenario: a generator, tokens, I, O and a dtype -> x [T, I], w [O, I], float64.
Scenario = Callable[[torch.Generator, int, int, int, torch.dtype], tuple[Tensor, Tensor]]


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def log_uniform(g: torch.Generator, *shape: int, low: float, high: float) -> Tensor:
    """Magnitudes from 10^low to 10^high with random signs."""
    size = 10.0 ** (low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64))
    return size * (1 - 2 * torch.randint(2, shape, generator=g))


def outlier(size: float, channels: int, weight: float) -> Scenario:
    """`channels` fixed channels have this size in two of three tokens; their weights are scaled by `weight`."""

    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w = normal(g, t, i), normal(g, o, i) * 0.05
        where = torch.randperm(i, generator=g)[:channels]
        x[:, where] = torch.where(torch.arange(t)[:, None] % 3 == 2, x[:, where], size * (1 + 0.05 * x[:, where]))
        w[:, where] *= weight
        return x.clamp(-65504, 65504), w

    return make


def moving_outlier(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One outlier per token, of different sizes, in the half of the channels whose weights are small but not all 0."""
    x, w = normal(g, t, i), normal(g, o, i) * 0.05
    small = (i + 1) // 2
    w[:, :small] *= 1e-4
    sizes = torch.tensor([1e2, 1e3, 1e4, 6e4], dtype=torch.float64)
    x[torch.arange(t), torch.randint(small, (t,), generator=g)] = sizes[torch.arange(t) % 4]
    return x, w


def log_uniform_x(decades: int) -> Scenario:
    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        high = min(decades / 2, 3.5)
        return log_uniform(g, t, i, low=high - decades, high=high), normal(g, o, i) * 0.05

    return make


def log_uniform_w(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(g, t, i), log_uniform(g, o, i, low=-4, high=0)


def opposite_sizes(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Large channels of x have small columns of W and vice versa, so that all products have the same size."""
    size = 10.0 ** (3 * torch.rand(i, generator=g, dtype=torch.float64))
    return normal(g, t, i) * size, normal(g, o, i) / size


def tiny_x(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Around and below the smallest normal number."""
    low, high = (-7.2, -4.2) if dtype == torch.float16 else (-40, -37)
    return log_uniform(g, t, i, low=low, high=high), normal(g, o, i)


def huge_x(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Near the largest finite number; the sums are at most half of it."""
    largest = torch.finfo(dtype).max
    x = (0.5 + 0.5 * torch.rand(t, i, generator=g, dtype=torch.float64)) * largest
    return x * (1 - 2 * torch.randint(2, (t, i), generator=g)), normal(g, o, i).clamp(-4, 4) / (8 * i)


def scale_w(size: float, size16: float) -> Scenario:
    """All of W has one size, a different one in float16."""

    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return normal(g, t, i), normal(g, o, i) * (size16 if dtype == torch.float16 else size)

    return make


def tiny_tokens(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every second token is tiny."""
    size = 1e-5 if dtype == torch.float16 else 1e-30
    return normal(g, t, i) * torch.where(torch.arange(t) % 2 == 0, 1.0, size)[:, None], normal(g, o, i) * 0.05


def one_hot_x(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.zeros(t, i, dtype=torch.float64)
    x[torch.arange(t), torch.randint(i, (t,), generator=g)] = normal(g, t)
    return x, normal(g, o, i)


def permutation_w(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One nonzero weight per row; each token has outliers in channels that these rows do not read."""
    x, w = normal(g, t, i), torch.zeros(o, i, dtype=torch.float64)
    w[torch.arange(o), torch.randperm(max(i, o), generator=g)[:o] % i] = 1.0
    x[:, :: max(i // 8, 1)] *= 1e4
    return x.clamp(-65504, 65504), w


def w_where_x_is_small(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every second row of W is nonzero only where x is a thousandth of its maximum."""
    large = torch.rand(i, generator=g) < 0.25
    x, w = normal(g, t, i), normal(g, o, i) * 0.1
    x[:, large] *= 1e3
    w[::2, large] = 0.0
    return x, w


def one_weight_a_row(shuffled: bool) -> Scenario:
    """W is the identity (for equal O and I) or a permutation, so that y is x."""

    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = torch.zeros(o, i, dtype=torch.float64)
        w[torch.arange(o), (torch.randperm(max(i, o), generator=g)[:o] if shuffled else torch.arange(o)) % i] = 1.0
        return normal(g, t, i), w

    return make


def pruned(share: float) -> Scenario:
    """This share of the weights is nonzero."""

    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return normal(g, t, i), normal(g, o, i) * 0.05 * (torch.rand(o, i, generator=g) < share)

    return make


def one_weight_a_block(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w = torch.zeros(o, i, dtype=torch.float64)
    for first in range(0, i, 64):
        w[torch.arange(o), first + torch.randint(min(64, i - first), (o,), generator=g)] = normal(g, o)
    return normal(g, t, i), w


def outlier_in_w(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One weight per row is 10 to 10^5 times the others, except in every fourth row."""
    w, rows = normal(g, o, i) * 1e-3, torch.arange(o) % 4 != 3
    size = 10.0 ** (1 + 4 * torch.rand(o, generator=g, dtype=torch.float64))
    w[torch.arange(o)[rows], torch.randint(i, (o,), generator=g)[rows]] = 1e-3 * size[rows]
    return normal(g, t, i), w


def x_in_parts(other: Scenario) -> Scenario:
    """Every 64 channels have their own size, the same for all tokens or different ones."""

    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w = other(g, t, i, o, dtype)
        parts = -(-i // 64)
        size = torch.where(
            torch.arange(t)[:, None] % 2 == 0, torch.rand(1, parts, generator=g), torch.rand(t, parts, generator=g)
        )
        return x * (10.0 ** (4 * size.double() - 2)).repeat_interleave(64, 1)[:, :i], w

    return make


def sparse_x(share: float, other: Scenario) -> Scenario:
    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w = other(g, t, i, o, dtype)
        return x * (torch.rand(t, i, generator=g) < share), w

    return make


def w_where_x_is_tiny(share: float) -> Scenario:
    """This share of the channels of x is a thousandth of the others, and every second row of W reads only these."""

    def make(g: torch.Generator, t: int, i: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tiny = torch.rand(i, generator=g) < share
        x, w = normal(g, t, i), normal(g, o, i) * 0.1
        x[:, tiny] *= 1e-3
        w[::2, ~tiny] = 0.0
        return x, w

    return make


SCENARIOS: dict[str, Scenario] = {
    "normal": lambda g, t, i, o, dtype: (normal(g, t, i), normal(g, o, i) * 0.05),
    **{f"outlier-{s:g}": outlier(s, 1, 1e-3) for s in (1e2, 1e3, 1e4, 6e4)},
    "outlier-1e2-ordinary-column": outlier(1e2, 1, 1.0),
    "outliers-3e3": outlier(3e3, 4, 1e-2),
    "moving-outlier": moving_outlier,
    "log-uniform-x-4": log_uniform_x(4),
    "log-uniform-x-8": log_uniform_x(8),
    "log-uniform-w": log_uniform_w,
    "opposite-sizes": opposite_sizes,
    "tiny-x": tiny_x,
    "huge-x": huge_x,
    "w-1e30": scale_w(1e30, 1e2),
    "w-1e-30": scale_w(1e-30, 1e-3),
    "w-1e-38": scale_w(1e-38, 1e-6),
    "tiny-tokens": tiny_tokens,
    "one-hot-x": one_hot_x,
    "permutation-w": permutation_w,
    "w-where-x-is-small": w_where_x_is_small,
    "w-where-x-is-tiny": w_where_x_is_tiny(0.33),
    "identity-w": one_weight_a_row(False),
    "shuffled-w": one_weight_a_row(True),
    **{f"pruned-w-{share:g}": pruned(share) for share in (0.5, 0.1, 0.03, 0.01, 0.002)},
    "one-weight-a-block": one_weight_a_block,
    "outlier-in-w": outlier_in_w,
    "parts-of-x": x_in_parts(pruned(0.02)),
    "sparse-x": sparse_x(0.02, pruned(1.0)),
    "sparse-x-and-w": sparse_x(0.5, pruned(0.05)),
}
GROUPS = [1, 2, 4, 8, 16, 17, 48, 64, 300]  # tokens per call
if _C.cpu_isa() == "scalar":
    GROUPS = [1, 17, 300]  # it has one kernel for all, and little time
SHAPES = [(256, 1024), (260, 516), (301, 333)]  # O, I: multiples of 64, of 4, odd


def sweep(p: Problem, groups: list[int]) -> None:
    expected = p.expected()
    failures = {}
    for m in groups:
        tokens = min(max(2 * m, 8), TOKENS)
        if found := expected.rows(slice(tokens)).failures(p.in_groups(m, tokens)):
            failures[m] = "; ".join(found)
    assert not failures, "\n".join(f"{m} tokens: {text}" for m, text in failures.items())


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_row_and_column(scenario: str, forward: bool, dtype: torch.dtype) -> None:
    """Cycles through shapes, scale forms and adapters for the combinations."""
    turn = list(SCENARIOS).index(scenario) + DTYPES.index(dtype) + 2 * forward
    o, i = SHAPES[turn % len(SHAPES)]
    x, w = SCENARIOS[scenario](seeded(turn), TOKENS, i, o, dtype)
    rank = 16 if turn % 4 == 1 and scenario != "huge-x" else 0  # h would not be finite
    sweep(problem(x, w, dtype, forward, nested=turn % 2 == 0, rank=rank), GROUPS)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
def test_tiny_x_exactly_where_rows_have_their_weights(forward: bool, dtype: torch.dtype) -> None:
    """The exception that docs/security.md describes: few tiny values, and rows that read only these."""
    x, w = w_where_x_is_tiny(0.08)(seeded(8), 64, 1024, 256, dtype)
    p = problem(x, w, dtype, forward, nested=False)
    steps = (accuracy.forward_steps if forward else accuracy.dx_steps)(to_f64(p.x), p.w)
    for m in (m for m in GROUPS if m <= 64):
        accuracy.assert_accurate(p.in_groups(m, 64), p.expected().with_steps(steps))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_permutation_gives_x_back(double_quant: bool, dtype: torch.dtype) -> None:
    """1 to 48 tokens with W = 1, with a shuffled W, and with both as experts of a stack."""
    g = seeded(1)
    orders = torch.arange(192), torch.randperm(192, generator=g)
    weights = [qlora_ext.quantize_nf4(torch.eye(192)[order], 64, double_quant) for order in orders]
    for m in (1, 2, 6, 16, 48):
        x = normal(g, m, 192).to(dtype)
        for order, w4 in zip(orders, weights, strict=True):
            y = OPS.linear_nf4(x, *w4.operands(192, None, None, None, 1.0, 0.0, 0, None))
            assert torch.equal(y, x[:, order])
            assert torch.equal(OPS.linear_nf4_dx(y, *w4.operands(192, None, None, 1.0, 0.0, 0, None)), x)
        experts = GroupedSample(x, [m // 2, m - m // 2], weights, None, None, None, 1.0, 0.0, 0)
        y = experts.forward()
        assert torch.equal(y, torch.cat([x[: m // 2], x[m // 2 :, orders[1]]]))
        assert torch.equal(experts.dx(y), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("neighbour", [1.0, 6e4])
def test_infinity_and_nan_reach_their_token_only(
    neighbour: float, shape: tuple[int, int], forward: bool, dtype: torch.dtype
) -> None:
    """With or without a large neighbour. Infinity times a zero weight is NaN; times other weights it may be NaN."""
    o, i = shape
    g = seeded(o, i)
    x, w = normal(g, 64, i), normal(g, o, i) * 0.05
    x[:, i // 2] *= neighbour
    x = x.clamp(-60000, 60000)
    p = problem(x, w, dtype, forward)
    groups = [m for m in GROUPS if m <= 64]
    clean = {m: p.in_groups(m, 64) for m in groups}
    bad, channels = torch.tensor([1, 5, 20, 40]), torch.tensor([0, i // 2 + 1, i - 1, 3])
    p.x[bad, channels] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf], dtype=dtype)
    with np.errstate(invalid="ignore"):
        expected = to_f64(p.x[bad]) @ (p.w.T if forward else p.w)
    others = torch.ones(64, dtype=torch.bool)
    others[bad] = False
    for m in groups:
        y = p.in_groups(m, 64)
        got = to_f64(y[bad])
        assert (np.isnan(got) | (got == expected)).all(), f"{m} tokens"
        assert torch.equal(y[others], clean[m][others]), f"{m} tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_reaches_its_outputs_only(value: float, forward: bool, dtype: torch.dtype) -> None:
    for o, i in SHAPES:
        g = seeded(o, i)
        p = problem(normal(g, TOKENS, i), normal(g, o, i) * 0.05, dtype, forward, nested=False)
        clean = {m: p.in_groups(m, m) for m in GROUPS}
        p.w4.absmax[len(p.w4.absmax) // 2] = value
        first = len(p.w4.absmax) // 2 * 64
        touched = np.zeros(p.w.size, bool)
        touched[first : first + 64] = True
        outputs = torch.from_numpy(touched.reshape(p.w.shape).any(axis=1 if forward else 0))
        for m in GROUPS:
            y = p.in_groups(m, m)
            assert not y[:, outputs].isfinite().any(), f"{m} tokens"
            assert torch.equal(y[:, ~outputs], clean[m][:, ~outputs]), f"{m} tokens"


@pytest.mark.campaign
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("shape", [*SHAPES, (256, 4096), (4096, 256), (1000, 1030)], ids=str)
def test_every_combination(shape: tuple[int, int], scenario: str, forward: bool, dtype: torch.dtype) -> None:
    o, i = shape
    for seed in range(ATTACK):
        x, w = SCENARIOS[scenario](seeded(seed, o, i), TOKENS, i, o, dtype)
        for nested in (False, True):
            for rank in (0, 16) if scenario != "huge-x" else (0,):
                sweep(problem(x, w, dtype, forward, 32 << seed % 8, nested, rank), GROUPS)
