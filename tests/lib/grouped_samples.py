"""Problems over experts on any device, with their exact results. Each expert is computed over all rows, and only its
own rows are used, because dropout depends on the index of a row among all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import accuracy
from forms import random_weight
from qlora_ext._internal.loans import PackedTensors
from qlora_ext.form import Form
from qlora_ext.weight import TENSORS, Weight4bit, operands, quantize
from samples import LinearSample, linear_sample

OPS = torch.ops.qlora

# Rows per expert: none at the ends and in between, one, one tile, many.
SKEWED = {
    8: [0, 3, 0, 17, 1, 0, 70, 5],
    64: [0] * 20 + [9] + [0] * 3 + [1, 2, 33] + [0] * 30 + [1] * 7,
    128: [1, 0, 0] * 20 + [40] + [0] * 40 + [2, 1, 0] * 9,
}


@dataclasses.dataclass
class GroupedSample:
    """x [S, K], the rows of each expert, packed weights [N, K], bias [E, N], lora_a [E, R, K], lora_b [E, N, R]."""

    x: Tensor
    counts: Sequence[int]
    weights: list[Weight4bit]
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    dropout_p: float
    seed: int
    seed_tensor: Tensor | None = None

    def __post_init__(self) -> None:
        self.offsets = torch.tensor(self.counts).cumsum(0).to(self.x.device)
        stacks = ([getattr(w, name) for w in self.weights] for name in TENSORS)
        self.stack = PackedTensors(*(None if s[0] is None else torch.stack(s).to(self.x.device) for s in stacks))
        self.n, self.k = self.weights[0].shape

    @property
    def lora_args(self) -> tuple:
        return self.lora_a, self.lora_b, self.scaling, self.dropout_p, self.seed

    def args(self) -> tuple:
        """The arguments of torch.ops.qlora.grouped_linear_nf4 after x and the offsets."""
        return operands(self.stack, self.weights[0], self.n, self.bias, *self.lora_args, self.seed_tensor)

    def dx_args(self) -> tuple:
        """The arguments of torch.ops.qlora.grouped_linear_nf4_dx after dy and the offsets."""
        return operands(self.stack, self.weights[0], self.k, *self.lora_args, self.seed_tensor)

    def forward(self, offsets: Tensor | None = None, with_h: bool = False) -> Any:
        at = self.offsets if offsets is None else offsets
        return (OPS.grouped_linear_nf4_with_h if with_h else OPS.grouped_linear_nf4)(self.x, at, *self.args())

    def dx(self, dy: Tensor, offsets: Tensor | None = None, with_g: bool = False) -> Any:
        at = self.offsets if offsets is None else offsets
        return (OPS.grouped_linear_nf4_dx_with_g if with_g else OPS.grouped_linear_nf4_dx)(dy, at, *self.dx_args())

    def dlora(self, dy: Tensor, offsets: Tensor | None = None, **given: Tensor) -> tuple[Tensor, Tensor]:
        at = self.offsets if offsets is None else offsets
        return OPS.grouped_linear_nf4_dlora(dy, self.x, at, *self.lora_args, self.seed_tensor, **given)

    def dy(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(len(self.x), self.n, generator=generator).to(self.x)

    def parts(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, with their rows."""
        begin = 0
        for e, count in enumerate(self.counts):
            if count:
                yield e, slice(begin, begin + count)
            begin += count

    def unassigned(self) -> slice:
        return slice(sum(self.counts), None)

    def of_expert(self, e: int, x: Tensor) -> LinearSample:
        own = (None if t is None else t[e] for t in (self.bias, self.lora_a, self.lora_b))
        w4 = self.weights[e].to(self.x.device)
        return LinearSample(x, w4, *own, self.scaling, self.dropout_p, self.seed)

    def _of_parts(self, expected: Callable[[LinearSample], accuracy.Expected]) -> accuracy.Expected:
        return accuracy.concatenate([expected(self.of_expert(e, self.x)).rows(rows) for e, rows in self.parts()])

    def forward_accuracy(self) -> accuracy.Expected:
        return self._of_parts(LinearSample.forward_accuracy)

    def dx_accuracy(self, dy: Tensor) -> accuracy.Expected:
        return self._of_parts(lambda s: s.dx_accuracy(dy))

    def h_accuracy(self) -> accuracy.Expected:
        return self._of_parts(LinearSample.h_accuracy)

    def g_accuracy(self, dy: Tensor) -> accuracy.Expected:
        return self._of_parts(lambda s: s.g_accuracy(dy))

    def dlora_accuracy(self, dy: Tensor) -> dict[int, tuple[accuracy.Expected, accuracy.Expected]]:
        return {e: self.of_expert(e, self.x).dlora_accuracy(self.only(dy, rows)) for e, rows in self.parts()}

    def check_dlora(self, found: tuple[Tensor, Tensor], dy: Tensor) -> None:
        expected = self.dlora_accuracy(dy)
        for e in range(len(self.counts)):
            for gradient, of_own in zip(found, expected.get(e, (None, None)), strict=True):
                if of_own is None:
                    assert not gradient[e].any()
                else:
                    accuracy.assert_accurate(gradient[e], of_own)

    @property
    def differentiable(self) -> list[Tensor]:
        return [t for t in (self.x, self.bias, self.lora_a, self.lora_b) if t is not None]

    @staticmethod
    def only(dy: Tensor, rows: slice) -> Tensor:
        """dy with all other rows zeroed, so that they do not change a sum over the rows."""
        own = torch.zeros_like(dy)
        own[rows] = dy[rows]
        return own


def assert_like_single_experts(g: GroupedSample) -> None:
    """The forward and dx of all experts are those of each expert alone."""
    y, dy = g.forward(), g.dy()
    dx = g.dx(dy)
    for e, rows in g.parts():
        one = g.of_expert(e, g.x[rows])
        expected = OPS.linear_nf4_dx(*one.dx_args(dy[rows]))
        torch.testing.assert_close(y[rows], OPS.linear_nf4(*one.args))
        torch.testing.assert_close(dx[rows], expected)


def grouped_sample(
    counts: Sequence[int],
    n: int = 48,
    k: int = 64,
    rank: int | None = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = True,
    dropout_p: float = 0.0,
    block_size: int = 64,
    double_quant: bool = True,
    unassigned: int = 3,
    code: str = "nf4",
    form: Form | None = None,
) -> GroupedSample:
    """``unassigned`` rows follow those of the experts. ``form``: of random weights, in place of quantized ones."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * factor).to(device, dtype)

    experts = len(counts)
    quantized = Form.of(block_size=block_size, double_quant=double_quant, code=code)

    def weight(e: int) -> Weight4bit:
        if form is not None:
            return random_weight(form, (n, k), e, dtype)
        return quantize(torch.randn(n, k, generator=generator) * 0.05, quantized)

    return GroupedSample(
        x=randn(sum(counts) + unassigned, k),
        counts=counts,
        weights=[weight(e) for e in range(experts)],
        bias=randn(experts, n) if bias else None,
        lora_a=None if rank is None else randn(experts, rank, k, factor=max(k, 1) ** -0.5),
        lora_b=None if rank is None else randn(experts, n, rank, factor=0.2),
        scaling=0.5,
        dropout_p=dropout_p,
        seed=1234,
    )


def of_experts(m: int = 5, n: int = 48, k: int = 64, *args: Any, **options: Any) -> GroupedSample:
    """As ``linear_sample``, over experts: m rows of five of them, two without any, and of none."""
    return grouped_sample([0, m // 2, 1, 0, m - m // 2], n, k, *args, **options)


# A problem over one weight, or over experts, whose methods are the same.
KINDS = {"linear": linear_sample, "experts": of_experts}
