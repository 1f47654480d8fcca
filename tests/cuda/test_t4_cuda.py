"""The linear operators on compute capability 7.5, which has no bfloat16, and runs only the forward on tensor cores."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
import torch

import qlora_ext
from cuda_cases import on_t4
from samples import linear_sample

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora
ROOT = pathlib.Path(__file__).parents[2]


# Together they include every wrapper in cuda/ptx that has a second body for 7.5.
@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.parametrize(
    "source",
    [
        "generic/low_rank_update",
        "generic/linear_nf4_dlora",
        "generic/quantize_nf4",
        "generic/encode_nf4",
        "sm75/linear_nf4",
    ],
)
def test_kernels_for_a_t4_compile(source: str, tmp_path: pathlib.Path) -> None:
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT), "-arch=sm_75", "-cubin"]
    path = ROOT / "cuda" / "launch" / f"{source}.cu"
    subprocess.run(["nvcc", *flags, "-o", str(tmp_path / "kernels.cubin"), str(path)], check=True)


@on_t4
def test_bfloat16_is_refused() -> None:
    s = linear_sample(3, 24, 64, 4, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="bfloat16 needs compute capability 8.0 or newer, and this device has 7.5"):
        OPS.linear_nf4(*s.args)


@on_t4
def test_kernels_of_newer_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    s = linear_sample(3, 24, 64, 4, torch.float16, "cuda")
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "tensor_cores")
    with pytest.raises(ValueError, match="does not take linear_nf4 .* capability 7.5: expected sm75, library or exact"):
        OPS.linear_nf4(*s.args)


@on_t4
def test_a_bfloat16_weight_is_quantized_and_computes_in_float16() -> None:
    dense = torch.nn.Linear(64, 48, dtype=torch.bfloat16, device="cuda")
    layer = qlora_ext.nn.Linear4bit.from_linear(dense, qlora_ext.dtypes.computing_dtype(torch.bfloat16, "cuda"))
    x = torch.randn(5, 64, device="cuda", dtype=torch.float16)
    w = layer.weight4bit.dequantize(torch.float32)
    y = layer(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), x.float() @ w.T + dense.bias.float(), rtol=2e-3, atol=2e-3)
