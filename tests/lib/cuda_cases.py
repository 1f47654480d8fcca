"""Problems of the linear operators on CUDA, as rows: the operator, the sizes, and the kernel that is forced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from forms import FORMS, WIDE_FORMS, random_weight
from operator_results import gradient
from samples import LinearSample, linear_sample

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALF = [BF16, F16]
FORWARD, DX, DLORA = "linear_nf4", "linear_nf4_dx", "linear_nf4_dlora"
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
on_hopper = pytest.mark.skipif(
    CAPABILITY != (9, 0), reason="the device is not of compute capability 9.0, which alone has wgmma"
)
on_b200 = pytest.mark.skipif(
    CAPABILITY[0] != 10, reason="the device is not of compute capability 10.x, whose tcgen05 the kernel needs"
)
on_t4 = pytest.mark.skipif(CAPABILITY != (7, 5), reason="the device is not of compute capability 7.5")
on_newer = pytest.mark.skipif(CAPABILITY == (7, 5), reason="compute capability 7.5 does not have this kernel")
FEW = 8 if CAPABILITY[0] >= 10 else 16  # the most tokens that few_tokens takes

# Tile, splits and shapes (m, n, k) of Hopper's kernels: all tails of tokens, of outputs, and of stages, which have 128
# k in the forward and 64 rows in dX. On 132 multiprocessors, an H100's, these are the choice (test_cuda_choices.py).
SM90 = {
    FORWARD: {
        (64, 128, 128): (64, 1),
        (33, 56, 64): (64, 1),
        (65, 259, 320): (64, 3),
        (200, 1, 192): (64, 1),
        (127, 136, 832): (64, 7),
        (70, 40, 1984): (64, 8),
        (257, 5100, 64): (128, 1),
        (129, 8323, 192): (128, 1),
        (193, 4090, 960): (128, 2),
    },
    DX: {
        (64, 128, 128): (64, 1),
        (33, 56, 64): (64, 1),
        (65, 264, 320): (64, 5),
        (200, 8, 192): (64, 1),
        (70, 1000, 64): (64, 8),
        (129, 72, 8448): (128, 1),
        (257, 136, 8384): (256, 1),
        (193, 520, 4160): (256, 3),
        (290, 456, 4032): (128, 1),
    },
}


@dataclasses.dataclass
class Case:
    op: str
    m: int | tuple[int, ...]
    n: int
    k: int
    rank: int | None = 16
    dtype: torch.dtype = BF16
    kernel: str = ""  # the value of QLORA_CUDA_KERNEL; empty: the choice
    again: int = 0  # how often it is repeated, for the same bits
    form: str | None = None  # of random weights, in place of quantized ones
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of ``linear_sample``

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        parts = [self.op, self.kernel, f"{self.m}x{self.n}x{self.k}", f"r{self.rank}", str(self.dtype)[6:], self.form]
        return "-".join(filter(None, [*parts, *options]))

    def sample(self, seed: int = 0) -> tuple[LinearSample, Tensor]:
        """The operands, and the gradient of y."""
        s = linear_sample(self.m, self.n, self.k, self.rank, self.dtype, "cuda", seed=seed, **self.options)
        if self.form is not None:
            s.w4 = random_weight((FORMS | WIDE_FORMS)[self.form], (self.n, self.k), device="cuda")
        return s, gradient(s)


def case(op: str, m: int | tuple[int, ...], n: int, k: int, *fields: Any, **options: Any) -> Case:
    named = {name: options.pop(name) for name in ("rank", "dtype", "kernel", "again", "form") if name in options}
    return Case(op, m, n, k, *fields, **named, options=options)


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test by ``case``. The kernels of a single architecture are skipped on other devices."""
    only = {name: on_newer for name in ("few_tokens", "tensor_cores", "ragged", "gemm")}
    only |= {"sm75": on_t4, "sm90": on_hopper, "sm100": on_b200}
    marked = [pytest.param(c, marks=only.get(c.kernel.split(":")[0], ()), id=str(c)) for c in cases]
    return pytest.mark.parametrize("case", marked)
