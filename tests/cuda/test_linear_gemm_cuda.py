"""Many tokens on CUDA: a panel of the weight is decoded, and our own GEMM multiplies by it. LoRA and bias are added in
its float32 sums, which are rounded once."""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_accurate
from samples import LinearSample, linear_sample

pytestmark = pytest.mark.cuda

OPS = torch.ops.qlora
FORMS = [
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "rank": None, "bias": False},
    {"dtype": torch.bfloat16, "rank": 5, "dropout_p": 0.3},  # rows of h, g and lora_b begin at any address
    {"dtype": torch.float16, "rank": 24, "dropout_p": 1.0},
    {"dtype": torch.float16, "rank": 144, "double_quant": False},  # LoRA takes more stages than are copied ahead
]


@pytest.fixture(autouse=True)
def by_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "gemm")


def gradient(s: LinearSample) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(s.x.shape[:-1].numel(), s.w4.shape[0], generator=generator).to("cuda", s.x.dtype)


def input_gradient(s: LinearSample) -> torch.Tensor:
    return OPS.linear_nf4_dx(*s.dx_args(gradient(s)))


def check(s: LinearSample) -> None:
    y = OPS.linear_nf4(*s.args)
    assert_accurate(y, s.forward_accuracy())
    assert torch.equal(y, OPS.linear_nf4(*s.args))
    dx = input_gradient(s)
    assert_accurate(dx, s.dx_accuracy(gradient(s)))
    assert torch.equal(dx, input_gradient(s))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_input_gradient(form: dict) -> None:
    """Tiles of tokens and columns that are not full, and sums that end within a stage."""
    check(linear_sample(m=150, n=280, k=328, device="cuda", **form))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (128, 256, 32), (129, 264, 1096)])
def test_one_stage_and_many(m: int, n: int, k: int) -> None:
    check(linear_sample(m, n, k, 16, torch.bfloat16, "cuda", dropout_p=0.2))


def test_outputs_of_any_number() -> None:
    s = linear_sample((2, 20), 37, 72, 3, torch.bfloat16, "cuda", dropout_p=0.2)
    assert_accurate(OPS.linear_nf4(*s.args).view(40, 37), s.forward_accuracy())
    with pytest.raises(ValueError, match="gemm does not take linear_nf4_dx of m=40 n=37"):
        input_gradient(s)


def test_panels_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three panels, the last of which is not whole, against a single one. The mask counts columns over all panels."""
    s = linear_sample(70, 600, 592, 8, torch.bfloat16, "cuda", dropout_p=0.4, block_size=128)
    y, dx = OPS.linear_nf4(*s.args), input_gradient(s)
    assert_accurate(dx, s.dx_accuracy(gradient(s)))
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "gemm:panel=256")
    assert torch.equal(y, OPS.linear_nf4(*s.args))
    assert torch.equal(dx, input_gradient(s))
