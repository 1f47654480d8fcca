"""Problems shared by the operator tests, on any device, with float64 results from the oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import accuracy
import forms
import qlora_ext
import reference
from qlora_ext.form import Form
from qlora_ext.weight import Weight4bit, operands, quantize

OPS = torch.ops.qlora
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPCHECKS = (  # all checks of torch.library.opcheck, which omits the last one by default
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
    "test_aot_dispatch_static",
)


def to_f64(t: Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()


def rows(t: Tensor) -> np.ndarray:
    """[..., C] -> float64 [rows, C]."""
    return to_f64(t).reshape(t.shape[:-1].numel(), t.shape[-1])


@dataclasses.dataclass
class LinearSample:
    """x [..., K], a packed weight [N, K], bias [N], lora_a [R, K], lora_b [N, R] and the scalars of one call."""

    x: Tensor
    w4: Weight4bit
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    dropout_p: float
    seed: int
    seed_tensor: Tensor | None = None

    @property
    def args(self) -> tuple:
        """The arguments in the order of torch.ops.qlora.linear_nf4."""
        return self.x, *operands(self.w4, self.w4, self.w4.shape[0], self.bias, *self.lora_args, self.seed_tensor)

    def dx_args(self, dy: Tensor) -> tuple:
        """The arguments of torch.ops.qlora.linear_nf4_dx."""
        return dy, *operands(self.w4, self.w4, self.w4.shape[1], *self.lora_args, self.seed_tensor)

    @property
    def lora_args(self) -> tuple:
        return self.lora_a, self.lora_b, self.scaling, self.dropout_p, self.seed

    @property
    def differentiable(self) -> list[Tensor]:
        return [t for t in (self.x, self.bias, self.lora_a, self.lora_b) if t is not None]

    def forward(self, with_h: bool = False) -> Any:
        return (OPS.linear_nf4_with_h if with_h else OPS.linear_nf4)(*self.args)

    def dx(self, dy: Tensor, with_g: bool = False) -> Any:
        return (OPS.linear_nf4_dx_with_g if with_g else OPS.linear_nf4_dx)(*self.dx_args(dy))

    def dlora(self, dy: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.linear_nf4_dlora(dy, self.x, *self.lora_args, self.seed_tensor, **given)

    def dy(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*self.x.shape[:-1], self.w4.shape[0], generator=generator).to(self.x)

    def decoded(self) -> np.ndarray:
        """The exact float32 weight as float64 [N, K], decoded by the oracle."""
        return forms.oracle(self.w4).astype(np.float64)

    def lora64(self) -> tuple:
        arrays = [None if t is None else to_f64(t) for t in (self.lora_a, self.lora_b)]
        return (*arrays, self.scaling, self.dropout_p, self.seed)

    def bias64(self) -> np.ndarray | None:
        return None if self.bias is None else to_f64(self.bias)

    def expected(self) -> np.ndarray:
        y = reference.linear(rows(self.x), self.decoded(), self.bias64(), *self.lora64())
        return y.reshape(*self.x.shape[:-1], self.w4.shape[0])

    def expected_dx(self, dy: Tensor) -> np.ndarray:
        return reference.linear_dx(rows(dy), self.decoded(), *self.lora64()).reshape(self.x.shape)

    def expected_dlora(self, dy: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return reference.linear_dlora(rows(dy), rows(self.x), *self.lora64())

    def forward_accuracy(self) -> accuracy.Expected:
        return accuracy.forward(rows(self.x), self.decoded(), self.bias64(), *self.lora64(), self.x.dtype)

    def dx_accuracy(self, dy: Tensor) -> accuracy.Expected:
        return accuracy.dx(rows(dy), self.decoded(), *self.lora64(), self.x.dtype)

    def dlora_accuracy(self, dy: Tensor) -> tuple[accuracy.Expected, accuracy.Expected]:
        return accuracy.dlora(rows(dy), rows(self.x), *self.lora64(), self.x.dtype)

    def h_accuracy(self) -> accuracy.Expected:
        dropped = rows(self.x) * reference.dropout_mask(rows(self.x).shape, self.dropout_p, self.seed)
        terms = accuracy.given(dropped), accuracy.given(self.scaling * to_f64(self.lora_a).T), 1.0
        return accuracy.sums([terms], 0.0, self.x.dtype)

    def g_accuracy(self, dy: Tensor) -> accuracy.Expected:
        terms = accuracy.given(rows(dy)), accuracy.given(self.scaling * to_f64(self.lora_b)), 1.0
        return accuracy.sums([terms], 0.0, self.x.dtype)

    def check_dlora(self, found: tuple[Tensor, Tensor], dy: Tensor) -> None:
        for gradient, expected in zip(found, self.dlora_accuracy(dy), strict=True):
            accuracy.assert_accurate(gradient, expected)


def linear_sample(
    m: int | tuple[int, ...] = 5,
    n: int = 48,
    k: int = 64,
    rank: int | None = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = True,
    dropout_p: float = 0.0,
    block_size: int = 64,
    double_quant: bool = True,
    requires_grad: bool = False,
    seed: int = 0,
    code: str = "nf4",
) -> LinearSample:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, factor: float = 1.0) -> Tensor:
        t = (torch.randn(*shape, generator=generator) * factor).to(device, dtype)
        return t.requires_grad_(requires_grad)

    lead = (m,) if isinstance(m, int) else m
    w = torch.randn(n, k, generator=generator) * 0.05
    return LinearSample(
        x=randn(*lead, k),
        # Quantized on the CPU: the bits are the same (test_codec.py), and simulating this takes longer than y.
        w4=quantize(w, Form.of(block_size=block_size, double_quant=double_quant, code=code)).to(device),
        bias=randn(n) if bias else None,
        lora_a=None if rank is None else randn(rank, k, factor=max(k, 1) ** -0.5),
        lora_b=None if rank is None else randn(n, rank, factor=0.2),
        scaling=0.5,
        dropout_p=dropout_p,
        seed=1234,
    )


def layer_and_adapter(double_quant: bool = True) -> tuple[qlora_ext.NF4Weight, Tensor, Tensor]:
    """A weight [96, 128] and an adapter of rank 8 that changes each element by less than the distance to a code."""
    w4 = qlora_ext.quantize_nf4(torch.randn(96, 128), double_quant=double_quant)
    return w4, 0.04 * torch.randn(8, 128), 0.04 * torch.randn(96, 8)


def relative_error(out: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """‖out - expected‖ / ‖expected‖ in float64; 0 where both are empty or zero."""
    got = to_f64(out) if isinstance(out, Tensor) else out
    assert got.shape == expected.shape, (got.shape, expected.shape)
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(got - expected))
    return difference / norm if norm else difference


def by_operator(s: LinearSample) -> Tensor:
    return OPS.linear_nf4(*s.args)


def by_function(s: LinearSample) -> Tensor:
    return qlora_ext.autograd.LinearNF4Function.apply(*s.args)


def by_python(s: LinearSample) -> Tensor:
    return qlora_ext.linear_nf4(s.x, s.w4, s.bias, *s.lora_args)


# The entry points of the layer, which have the same result.
WAYS = [by_operator, by_function, by_python]


def gradients(run, s: LinearSample) -> list[Tensor]:
    """y, and the gradients of the sum of its squares."""
    for t in s.differentiable:
        t.grad = None
    y = run()
    y.square().sum().backward()
    return [y.detach(), *(t.grad.clone() for t in s.differentiable)]
