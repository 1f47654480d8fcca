"""QLORA_CUDA_KERNEL on CUDA: what the forced kernel cannot run is refused, and nothing else runs. test_linear_cuda.py
has the results of every kernel that is forced."""

from __future__ import annotations

import pytest
import torch

from cuda_cases import BF16, CAPABILITY, DLORA, DX, F32, FORWARD, case
from forms import FORMS, random_weight
from grouped_samples import grouped_sample
from operator_results import OPS, call
from qlora_ext.form import Form
from samples import DTYPES

pytestmark = pytest.mark.cuda
VARIABLE = "QLORA_CUDA_KERNEL"
in_bfloat16 = pytest.mark.skipif(CAPABILITY == (7, 5), reason="the device does not compute in bfloat16")
M, N, K = 11, 136, 2048


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("tensor_cores", BF16), ("tensor_cores:ranks=64", BF16), ("ragged:ranks=32", BF16), ("exact", F32)],
)
def test_dlora(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are of a few tokens, in an order that does not depend on the ranks of a tile."""
    sample = case(DLORA, M, 72, 128, 16, dtype).sample()
    expected = call(DLORA, *sample)
    monkeypatch.setenv(VARIABLE, kernel)
    assert all(map(torch.equal, call(DLORA, *sample), expected))


@pytest.mark.parametrize("kernel", ["tensor_cores:tokens=32", "ragged:tokens=64"])
def test_experts(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's sum is in the same order in every tile of a kernel."""
    g = grouped_sample([3, 0, 9], 72, 128, 8, BF16, "cuda", unassigned=0)
    monkeypatch.setenv(VARIABLE, kernel.split(":")[0])
    expected = g.forward()
    monkeypatch.setenv(VARIABLE, kernel)
    assert torch.equal(g.forward(), expected)


# Kernel -> what the error says of the forward, for 8 tokens or 11.
REFUSED = {
    "fused": "expected NAME or NAME:KEY=NUMBER,... with the name few_tokens, .* got fused",
    "exact": f"exact does not take linear_nf4 of m={M} n={N} k={K} rank=16 bfloat16 on compute capability",
    "ragged:splits=2": "expected KEY=NUMBER after ragged:, with the key tokens, got splits=2",
    "tensor_cores:tokens=8": "expected tokens=16, 32 or 64 of tensor_cores for linear_nf4, got 8",
    "tensor_cores:splits=1000": "tensor_cores cannot run linear_nf4 .* with splits=1000: expected splits=",
    "few_tokens:splits=1000": r"few_tokens cannot run linear_nf4 of .* with splits=1000: expected splits=",
}
if CAPABILITY != (9, 0):
    REFUSED["sm90"] = "sm90 does not take linear_nf4 .*: expected (sm100, )?gemm, "


@in_bfloat16
@pytest.mark.parametrize("kernel", REFUSED)
def test_what_a_kernel_cannot_run_is_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    with pytest.raises(ValueError, match=f"^QLORA_CUDA_KERNEL: .*{REFUSED[kernel]}"):
        call(FORWARD, *case(FORWARD, 8 if kernel.startswith("few_tokens") else M, N, K).sample())


@in_bfloat16
def test_outputs_that_a_kernel_cannot_copy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "gemm")
    with pytest.raises(ValueError, match="gemm does not take linear_nf4_dx of m=40 n=37"):
        call(DX, *case(DX, (2, 20), 37, 72, 3).sample())


@in_bfloat16
@pytest.mark.skipif(CAPABILITY[0] >= 10, reason="from compute capability 10.0 on, no kernel takes streams")
def test_weights_and_tiles_without_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "tensor_cores:tokens=32,ctas=2")
    s, dy = case(FORWARD, 20, 128, 512, 8).sample()
    call(FORWARD, s, dy)
    s.w4 = random_weight(FORMS["awq"], (128, 512), device="cuda")
    with pytest.raises(ValueError, match="tensor_cores cannot run .* with ctas=2"):
        call(FORWARD, s, dy)


@in_bfloat16
def test_experts_whose_weights_are_scaled_one_by_one_have_no_tile_of_8_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 72, 128
    stack = random_weight(Form("e2m1", "table8", 32), (2, n, k), device="cuda")
    x, ends = torch.ones(3, k, dtype=BF16, device="cuda"), torch.tensor([1, 3], device="cuda")
    monkeypatch.setenv(VARIABLE, "tensor_cores:tokens=8")
    with pytest.raises(ValueError, match="^QLORA_CUDA_KERNEL: .* with tokens=8: expected tokens=16"):
        OPS.grouped_linear_nf4(x, ends, *stack.operands(n, None, None, None, 1.0, 0.0, 0, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_tokens_nothing_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "library")
    s, dy = case(FORWARD, 0, N, K, dtype=dtype).sample()
    assert call(FORWARD, s, dy)[0].shape == (0, N)
    assert not any(t.any() for t in call(DLORA, s, dy))
