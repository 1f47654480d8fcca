"""QLORA_CUDA_KERNEL on CUDA: every kernel of an operator, with every tile that it was compiled for and with sums split
otherwise than it would choose, meets the bounds of the choice; what it cannot run is refused, and nothing else runs."""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_accurate
from forms import random_weight
from grouped_samples import grouped_sample
from qlora_ext.form import Form
from samples import DTYPES, LinearSample, linear_sample

pytestmark = pytest.mark.cuda

OPS = torch.ops.qlora
VARIABLE = "QLORA_CUDA_KERNEL"
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
on_hopper = pytest.mark.skipif(
    CAPABILITY != (9, 0), reason="the device is not of compute capability 9.0, which alone has wgmma"
)
in_bfloat16 = pytest.mark.skipif(CAPABILITY == (7, 5), reason="the device does not compute in bfloat16")
M, N, K = 11, 136, 2048
FEW = 8 if CAPABILITY[0] >= 10 else 16  # the most that few_tokens takes
BF16 = torch.bfloat16

FORWARD = [
    ("few_tokens", BF16),
    (f"few_tokens:tokens={FEW},splits=2", BF16),
    ("tensor_cores", BF16),
    ("tensor_cores:splits=3", BF16),
    ("ragged", BF16),
    ("ragged:tokens=4", BF16),
    ("ragged:tokens=64", BF16),
    ("exact", torch.float32),
    ("exact:tokens=64", torch.float32),
    ("gemm", BF16),
    ("library", BF16),
]
DX = [
    ("tensor_cores", BF16),
    ("tensor_cores:tokens=8", BF16),
    ("tensor_cores:tokens=64,splits=3", BF16),
    ("ragged", BF16),
    ("ragged:tokens=16,splits=2", BF16),
    ("exact:splits=3", torch.float32),
    ("gemm:panel=1024", BF16),
    ("library", BF16),
]
DLORA = [
    ("tensor_cores", BF16),
    ("tensor_cores:ranks=64", BF16),
    ("ragged:ranks=32", BF16),
    ("exact", torch.float32),
]
HOPPER = ["sm90", "sm90:tokens=128,splits=2", "sm90:splits=4"]


def sample(dtype: torch.dtype, m: int = M) -> LinearSample:
    return linear_sample(m, N, K, 16, dtype, "cuda", dropout_p=0.2)


def check_forward(dtype: torch.dtype, m: int = M) -> None:
    s = sample(dtype, m)
    assert_accurate(OPS.linear_nf4(*s.args), s.forward_accuracy())


def check_dx(dtype: torch.dtype) -> None:
    s = sample(dtype)
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(5)).to("cuda", dtype)
    dx = OPS.linear_nf4_dx(*s.dx_args(dy))
    assert_accurate(dx, s.dx_accuracy(dy))


@pytest.mark.parametrize(("kernel", "dtype"), FORWARD)
def test_forward(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    check_forward(dtype, min(M, FEW) if kernel.startswith("few_tokens") else M)


@pytest.mark.parametrize(("kernel", "dtype"), DX)
def test_dx(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    check_dx(dtype)


@on_hopper
@pytest.mark.parametrize("kernel", HOPPER)
def test_hopper(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    check_forward(BF16)
    if "splits" not in kernel:  # dX sums over N, which has three stages
        check_dx(BF16)


@pytest.mark.parametrize(("kernel", "dtype"), DLORA)
def test_dlora(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are of a few tokens, in an order that does not depend on the ranks of a tile."""
    s = linear_sample(M, 72, 128, 16, dtype, "cuda")
    dy = torch.randn(M, 72, generator=torch.Generator().manual_seed(5)).to("cuda", dtype)
    expected = OPS.linear_nf4_dlora(dy, s.x, *s.lora_args)
    monkeypatch.setenv(VARIABLE, kernel)
    for got, chosen in zip(OPS.linear_nf4_dlora(dy, s.x, *s.lora_args), expected, strict=True):
        assert torch.equal(got, chosen)


@pytest.mark.parametrize("kernel", ["tensor_cores:tokens=32", "ragged:tokens=64"])
def test_experts(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's sum is in the same order in every tile of a kernel."""
    g = grouped_sample([3, 0, 9], 72, 128, 8, BF16, "cuda", unassigned=0)
    monkeypatch.setenv(VARIABLE, kernel.split(":")[0])
    expected = g.forward()
    monkeypatch.setenv(VARIABLE, kernel)
    assert torch.equal(g.forward(), expected)


@in_bfloat16
@pytest.mark.parametrize(
    ("kernel", "dtype", "text"),
    [
        ("fused", BF16, "expected NAME or NAME:KEY=NUMBER,... with the name few_tokens, .* got fused"),
        ("exact", BF16, f"exact does not take linear_nf4 of m={M} n={N} k={K} rank=16 bfloat16 on compute capability"),
        ("ragged:splits=2", BF16, "expected KEY=NUMBER after ragged:, with the key tokens, got splits=2"),
        ("tensor_cores:tokens=8", BF16, "expected tokens=16, 32 or 64 of tensor_cores for linear_nf4, got 8"),
        ("tensor_cores:splits=1000", BF16, "tensor_cores cannot run linear_nf4 .* with splits=1000: expected splits="),
        ("few_tokens:splits=1000", BF16, r"few_tokens cannot run linear_nf4 of .* with splits=1000: expected splits="),
    ],
)
def test_what_a_kernel_cannot_run_is_refused(
    kernel: str, dtype: torch.dtype, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    with pytest.raises(ValueError, match=f"^QLORA_CUDA_KERNEL: .*{text}"):
        OPS.linear_nf4(*sample(dtype, 8 if kernel.startswith("few_tokens") else M).args)


@in_bfloat16
def test_experts_whose_weights_are_scaled_one_by_one_have_no_tile_of_8_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 72, 128
    stack = random_weight(Form("e2m1", "table8", 32), (2, n, k), device="cuda")
    x, ends = torch.ones(3, k, dtype=BF16, device="cuda"), torch.tensor([1, 3], device="cuda")
    monkeypatch.setenv(VARIABLE, "tensor_cores:tokens=8")
    with pytest.raises(ValueError, match="^QLORA_CUDA_KERNEL: .* with tokens=8: expected tokens=16"):
        OPS.grouped_linear_nf4(x, ends, *stack.operands(n, None, None, None, 1.0, 0.0, 0, None))


@in_bfloat16
@pytest.mark.skipif(CAPABILITY == (9, 0), reason="this device has the kernel")
def test_another_architectures_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sm90")
    with pytest.raises(ValueError, match=r"^QLORA_CUDA_KERNEL: sm90 does not take linear_nf4 .*: expected gemm, "):
        OPS.linear_nf4(*sample(BF16).args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_tokens_nothing_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "library")
    s = sample(dtype, m=0)
    assert OPS.linear_nf4(*s.args).shape == (0, N)
    da, db = OPS.linear_nf4_dlora(s.x.new_zeros(0, N), s.x, *s.lora_args)
    assert not da.any()
    assert not db.any()
