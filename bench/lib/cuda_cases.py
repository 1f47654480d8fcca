"""The cases of bench/cuda_operators.py: our operators and their peers on the same operands, with expected results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qlora_ext
from qlora_ext.form import Form

from .forms import FORMS
from .harness import Ring, cold

OPS = torch.ops.qlora
BF16 = torch.bfloat16
RANK, SCALING, SEED = 16, 2.0, 5

Call = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from NF4 with double quantization and LoRA of rank 16 without dropout."""

    name: str = ""
    rank: int = RANK
    dropout_p: float = 0.0
    form: Form = Form()  # noqa: RUF009  # frozen


PLAIN = Variant()
VARIANTS = (
    Variant("rank 64", rank=64),
    Variant("dropout 0.1", dropout_p=0.1),
    Variant("float32 scales", form=Form(scales="float32")),
    *(Variant(name, form=FORMS[name]) for name in ("NVFP4", "GGUF Q4_0")),
)


def cold_bytes() -> int:
    """Operands rotate through five times the L2."""
    return 5 * torch.cuda.get_device_properties(0).L2_cache_size


def peer() -> object | None:
    """The module bitsandbytes; None if it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


@dataclasses.dataclass
class Case:
    """Contenders on the same operands, "ours" first. `bytes` and `flops` are lower bounds for one call."""

    operator: str
    n: int
    k: int
    m: int
    calls: Mapping[str, Call]
    expected: Callable[[int], Tensor | tuple[Tensor, ...]]
    bytes: float
    flops: float
    turns: int  # calls until the operands repeat


class Layer:
    """The weights and adapters of one linear layer, in enough copies that each is cold when it is used again."""

    def __init__(self, n: int, k: int, cold_bytes: int, variant: Variant = PLAIN) -> None:
        self.n, self.k, self.variant = n, k, variant
        form, rank = variant.form, variant.rank
        self.bnb = peer() if form.code == "nf4" else None
        self.dense: Ring[Tensor] = cold(lambda: normal(n, k) * 0.02, 2 * n * k, cold_bytes)
        self.ours = Ring(qlora_ext.quantize(w, form) for w in self.dense)
        while len(self.ours) * self.ours[0].nbytes < cold_bytes:
            self.ours.append(qlora_ext.quantize(normal(n, k) * 0.02, form))
        self.theirs: Ring[tuple] = Ring()
        if self.bnb is not None:
            quantize = self.bnb.functional.quantize_4bit
            for w4 in self.ours:
                w = w4.dequantize(BF16)
                self.theirs.append(quantize(w, blocksize=64, quant_type="nf4", compress_statistics=form.double_quant))
        self.lora = Ring((normal(rank, k) * k**-0.5, normal(n, rank) * 0.02) for _ in self.ours)

    @property
    def turns(self) -> int:
        return len(self.ours)

    def lora_args(self, i: int) -> tuple[object, ...]:
        """The arguments of the linear operators from lora_a to seed_tensor."""
        dropout = self.variant.dropout_p, SEED if self.variant.dropout_p else 0
        return *self.lora.at(i), SCALING, *dropout, None

    def forward_args(self, i: int, x: Tensor) -> tuple[object, ...]:
        return x, *self.ours.at(i).operands(self.n, None, *self.lora_args(i))

    def dx_args(self, i: int, dy: Tensor) -> tuple[object, ...]:
        return dy, *self.ours.at(i).operands(self.k, *self.lora_args(i))

    def add_lora(self, i: int, y: Tensor, x: Tensor) -> Tensor:
        a, b = (t.to(y.dtype) for t in self.lora.at(i))
        return y.addmm_(x @ a.T, b.T, alpha=SCALING)

    def add_lora_dx(self, i: int, dx: Tensor, dy: Tensor) -> Tensor:
        a, b = (t.to(dx.dtype) for t in self.lora.at(i))
        return dx.addmm_(dy @ b, a, alpha=SCALING)

    def _bytes(self, m: int) -> float:
        return self.ours[0].nbytes + 2 * (m * (self.n + self.k) + self.variant.rank * (self.n + self.k))

    def _flops(self, m: int) -> float:
        return 2.0 * m * (self.n * self.k + self.variant.rank * (self.n + self.k))

    def _operands(self, m: int, columns: int) -> Ring[Tensor]:
        return Ring(normal(m, columns) for _ in range(max(2, min(self.turns, (64 << 20) // (2 * m * columns)))))

    def _case(self, operator: str, m: int, calls: Mapping[str, Call], expected: Callable[[int], Any]) -> Case:
        if self.variant.dropout_p:  # only ours applies the mask
            calls = {"ours": calls["ours"], "bf16, no dropout": calls["bf16"]}
        # Many tokens take long enough for a few calls to be a sample.
        turns = self.turns if m <= 256 else min(self.turns, 4)
        return Case(operator, self.n, self.k, m, calls, expected, self._bytes(m), self._flops(m), turns)

    def forward(self, m: int) -> Case:
        x = self._operands(m, self.k)
        calls: dict[str, Call] = {
            "ours": lambda i: OPS.linear_nf4(*self.forward_args(i, x.at(i))),
            "bf16": lambda i: self.add_lora(i, F.linear(x.at(i), self.dense.at(i)), x.at(i)),
            "dequantize + cuBLAS": lambda i: self.add_lora(
                i, F.linear(x.at(i), self.ours.at(i).dequantize(BF16)), x.at(i)
            ),
        }
        if self.bnb is not None:
            base = self._their_base(x)
            calls["bitsandbytes"] = lambda i: self.add_lora(i, base(i), x.at(i))
            calls["bitsandbytes, no LoRA"] = base

        def expected(i: int) -> Tensor:
            if self.variant.dropout_p:  # the mask is the same on the CPU
                return on_cpu(OPS.linear_nf4, *self.forward_args(i, x.at(i)))
            return self.add_lora(i, x.at(i).float() @ self.ours.at(i).dequantize(torch.float32).T, x.at(i).float())

        return self._case("linear_nf4", m, calls, expected)

    def _their_base(self, x: Ring[Tensor]) -> Call:
        return lambda i: self.bnb.matmul_4bit(x.at(i), self.theirs.at(i)[0].t(), quant_state=self.theirs.at(i)[1])

    def input_gradient(self, m: int) -> Case:
        dy = self._operands(m, self.n)
        calls: dict[str, Call] = {
            "ours": lambda i: OPS.linear_nf4_dx(*self.dx_args(i, dy.at(i))),
            "bf16": lambda i: self.add_lora_dx(i, dy.at(i) @ self.dense.at(i), dy.at(i)),
            "dequantize + cuBLAS": lambda i: self.add_lora_dx(i, dy.at(i) @ self.ours.at(i).dequantize(BF16), dy.at(i)),
        }
        if self.bnb is not None:
            decode = self.bnb.functional.dequantize_4bit
            calls["bitsandbytes"] = lambda i: self.add_lora_dx(i, dy.at(i) @ decode(*self.theirs.at(i)), dy.at(i))

        def expected(i: int) -> Tensor:
            if self.variant.dropout_p:
                return on_cpu(OPS.linear_nf4_dx, *self.dx_args(i, dy.at(i)))
            return self.add_lora_dx(i, dy.at(i).float() @ self.ours.at(i).dequantize(torch.float32), dy.at(i).float())

        return self._case("linear_nf4_dx", m, calls, expected)

    def lora_gradients(self, m: int) -> Case:
        """The gradients of lora_a and lora_b from the low-rank products h and g that forward and dX have saved."""
        return self._lora_gradients("linear_nf4_dlora", m, given=True)

    def low_rank(self, m: int) -> Case:
        """The same with the low-rank products: what it takes more than `lora_gradients` is the time of h and g."""
        return self._lora_gradients("linear_nf4_dlora, h and g computed", m, given=False)

    def _lora_gradients(self, operator: str, m: int, given: bool) -> Case:
        x, dy = self._operands(m, self.k), self._operands(m, self.n)

        def args(i: int) -> tuple[object, ...]:
            return dy.at(i), x.at(i), *self.lora_args(i)

        saved: Ring[tuple[Tensor, ...]] = Ring([()])
        if given:
            turns = range(max(len(x), self.turns))
            h = (OPS.linear_nf4_with_h(*self.forward_args(i, x.at(i)))[1] for i in turns)
            g = (OPS.linear_nf4_dx_with_g(*self.dx_args(i, dy.at(i)))[1] for i in turns)
            saved = Ring(zip(h, g, strict=True))

        def by_torch(i: int) -> tuple[Tensor, Tensor]:
            a, b = self.lora.at(i)
            h, g = saved.at(i) or (SCALING * (x.at(i) @ a.T), SCALING * (dy.at(i) @ b))
            return g.T @ x.at(i), dy.at(i).T @ h

        def expected(i: int) -> tuple[Tensor, ...]:
            if self.variant.dropout_p:
                return on_cpu(OPS.linear_nf4_dlora, *args(i))
            a, b = (t.float() for t in self.lora.at(i))
            xf, dyf = x.at(i).float(), dy.at(i).float()
            return SCALING * (dyf @ b).T @ xf, SCALING * dyf.T @ (xf @ a.T)

        calls: dict[str, Call] = {"ours": lambda i: OPS.linear_nf4_dlora(*args(i), *saved.at(i)), "bf16": by_torch}
        case = self._case(operator, m, calls, expected)
        width = self.variant.rank * (self.n + self.k)
        moved = 2 * (m * (self.n + self.k) + width + (2 * m * self.variant.rank if given else width))
        return dataclasses.replace(case, bytes=moved, flops=(2.0 if given else 4.0) * m * width)

    def training_step(self, m: int) -> Case:
        """Forward, and backward to x, lora_a and lora_b. A call returns the gradient of x."""
        x = Ring(t.requires_grad_() for t in self._operands(m, self.k))
        dy = normal(m, self.n)
        adapters = Ring(tuple(t.detach().requires_grad_() for t in pair) for pair in self.lora)

        def step(y: Callable[[int], Tensor]) -> Call:
            return lambda i: torch.autograd.grad(y(i), (x.at(i), *adapters.at(i)), dy)[0]

        def lora(i: int) -> Tensor:
            a, b = adapters.at(i)
            return F.linear(F.linear(x.at(i), a), b) * SCALING

        calls = {
            "ours": step(lambda i: qlora_ext.linear_nf4(x.at(i), self.ours.at(i), None, *adapters.at(i), SCALING)),
            "bf16": step(lambda i: F.linear(x.at(i), self.dense.at(i)) + lora(i)),
        }
        if self.bnb is not None:
            base = self._their_base(x)
            calls["bitsandbytes"] = step(lambda i: base(i) + lora(i))

        def expected(i: int) -> Tensor:
            return self.add_lora_dx(i, dy.float() @ self.ours.at(i).dequantize(torch.float32), dy.float())

        case = self._case("training step", m, calls, expected)
        return dataclasses.replace(
            case, bytes=3 * case.bytes, flops=2 * case.flops + 8.0 * m * self.variant.rank * (self.n + self.k)
        )

    def quantize(self) -> Case:
        def ours(i: int) -> Tensor:
            packed, absmax = OPS.quantize_nf4(self.dense.at(i), 64)
            OPS.quantize_absmax(absmax, 256)
            return packed

        calls: dict[str, Call] = {"ours": ours}
        if self.bnb is not None:
            quantize = self.bnb.functional.quantize_4bit
            calls["bitsandbytes"] = lambda i: quantize(
                self.dense.at(i), blocksize=64, quant_type="nf4", compress_statistics=True
            )[0].view(self.n, self.k // 2)
        moved = 2 * self.n * self.k + self.ours[0].nbytes
        turns = len(self.dense)
        return Case("quantize", self.n, self.k, 0, calls, lambda i: self.ours.at(i % turns).packed, moved, 0.0, turns)

    def dequantize(self) -> Case:
        calls: dict[str, Call] = {"ours": lambda i: self.ours.at(i).dequantize(BF16)}
        if self.bnb is not None:
            decode = self.bnb.functional.dequantize_4bit
            calls["bitsandbytes"] = lambda i: decode(*self.theirs.at(i))
        moved = 2 * self.n * self.k + self.ours[0].nbytes
        expected = lambda i: self.ours.at(i).dequantize(torch.float32)  # noqa: E731
        return Case("dequantize", self.n, self.k, 0, calls, expected, moved, 0.0, self.turns)


def on_cpu(operator: Callable[..., Any], *args: object) -> Any:
    """The operator's results on the CPU, moved back."""
    results = operator(*(a.cpu() if isinstance(a, Tensor) else a for a in args))
    return results.cuda() if isinstance(results, Tensor) else tuple(t.cuda() for t in results)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)
