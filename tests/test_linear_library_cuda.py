"""Many tokens on CUDA: the weight is decoded into a workspace and a library multiplies; the answer is the same."""

from __future__ import annotations

import pytest
import torch

from samples import DTYPES, linear_sample, relative_error

pytestmark = pytest.mark.cuda

OPS = torch.ops.qlora
MANY = 1300  # past the crossover of every device in cuda/tuning.h
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
FORMS = [
    {},
    {"bias": False},
    {"rank": None},
    {"rank": None, "bias": False},
    {"dropout_p": 0.3},
    {"double_quant": False},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_input_gradient(form: dict, dtype: torch.dtype) -> None:
    s = linear_sample(m=MANY, n=48, k=128, dtype=dtype, device="cuda", **form)
    y = OPS.linear_nf4(*s.args)
    assert relative_error(y, s.expected()) < BOUNDS[dtype]
    dy = torch.randn(MANY, 48).to("cuda", dtype)
    dx = OPS.linear_nf4_dx(dy, *s.w4.packed_args(), 128, *s.lora_args)
    assert relative_error(dx, s.expected_dx(dy)) < BOUNDS[dtype]
    assert torch.equal(y, OPS.linear_nf4(*s.args))


def test_a_ragged_shape() -> None:
    s = linear_sample(m=(2, 75), n=33, k=101, dtype=torch.bfloat16, device="cuda")
    assert relative_error(OPS.linear_nf4(*s.args), s.expected()) < BOUNDS[torch.bfloat16]
