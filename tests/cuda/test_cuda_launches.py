"""Errors of our CUDA launches are raised once and cleared. Errors of other code are not attributed to us."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from accuracy import assert_accurate
from samples import DTYPES, linear_sample

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora


@pytest.fixture
def runtime() -> ctypes.CDLL:
    return ctypes.CDLL("libcudart.so.13")  # torch's CUDA runtime, which is loaded


@pytest.mark.skipif(
    "CUDASIM_TORCH_LIBRARY" not in os.environ, reason="a fault on a GPU would end the process's context"
)
@pytest.mark.parametrize("m", [1, 40, 1300])
def test_a_failed_call_leaves_no_error_behind(m: int, runtime: ctypes.CDLL) -> None:
    s = linear_sample(m, 64, 128, 4, torch.bfloat16, "cuda")
    s.w4.packed.untyped_storage().resize_(16)  # the kernel reads past its end
    with pytest.raises(RuntimeError, match="linear_nf4: CUDA launch failed"):
        OPS.linear_nf4(*s.args)
    assert runtime.cudaPeekAtLastError() == 0
    assert torch.equal(torch.ones(3, device="cuda") + 1, torch.full((3,), 2.0, device="cuda"))


def test_results_do_not_depend_on_when_a_launch_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    s = linear_sample(40, 136, 256, 16, DTYPES[-1], "cuda")
    dy = torch.randn(40, 136, device="cuda").to(s.x.dtype)

    def results() -> list[torch.Tensor]:
        return [
            OPS.linear_nf4(*s.args),
            OPS.linear_nf4_dx(*s.dx_args(dy)),
            *OPS.linear_nf4_dlora(dy, s.x, *s.lora_args),
        ]

    expected = results()
    monkeypatch.setenv("QLORA_CUDA_START", "in_order")
    assert all(map(torch.equal, results(), expected))
    monkeypatch.setenv("QLORA_CUDA_START", "late")
    with pytest.raises(ValueError, match="^QLORA_CUDA_START: expected in_order or nothing, got late"):
        results()


def test_an_earlier_error_is_not_ours(runtime: ctypes.CDLL) -> None:
    s = linear_sample(3, 64, 128, 4, torch.bfloat16, "cuda")
    dy = torch.ones(3, 64, device="cuda", dtype=torch.bfloat16)
    calls = [
        lambda: OPS.linear_nf4(*s.args),
        lambda: OPS.linear_nf4_dx(*s.dx_args(dy)),
        lambda: OPS.linear_nf4_dlora(dy, s.x, *s.lora_args),
        lambda: OPS.quantize_nf4(s.x, 64),
    ]
    for call in calls:
        call()
        assert runtime.cudaSetDevice(10**6) != 0  # an undetected error of other code
        call()
    assert_accurate(OPS.linear_nf4(*s.args), s.forward_accuracy())
    runtime.cudaGetLastError()
