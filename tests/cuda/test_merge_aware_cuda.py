"""Weights merged into 4 bits on CUDA have the CPU's codes, and merge-aware training has its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qlora_ext
from codec_checks import assert_bits
from qlora_ext.merged_linear import merged_linear_nf4
from qlora_ext.merging.codes import merged_weight, with_update
from samples import layer_and_adapter

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_codes_are_the_cpus(double_quant: bool) -> None:
    w4, a, b = layer_and_adapter(double_quant)
    moved = w4.dequantize(torch.float32) + 2.0 * (b @ a)
    expected = with_update(w4, moved)
    assert not torch.equal(expected.packed, w4.packed)
    assert_bits(with_update(w4.to("cuda"), moved.cuda()).packed, expected.packed, "codes")
    # The device sums B · A in a different order, which rarely moves a sum across a bound.
    merged = merged_weight(w4.to("cuda"), a.cuda(), b.cuda(), 2.0)
    assert (merged.packed.cpu() != merged_weight(w4, a, b, 2.0).packed).sum() <= 2


def test_stacks_on_cuda() -> None:
    parts = [qlora_ext.quantize_nf4(torch.randn(8, 40)) for _ in range(3)]
    stack = qlora_ext.NF4Weight.stack(parts)
    moved = torch.stack([part.dequantize(torch.float32) for part in parts]) + 0.01 * torch.randn(3, 8, 40)
    assert_bits(with_update(stack.to("cuda"), moved.cuda()).packed, with_update(stack, moved).packed, "codes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_are_the_cpus(dtype: torch.dtype) -> None:
    w4, a, b = layer_and_adapter()
    merged = merged_weight(w4, a, b, 2.0)
    inputs = [t.to(dtype) for t in (torch.randn(7, 128), torch.randn(96), a, b)]
    dy = torch.randn(7, 96).to(dtype)

    def trained(device: str) -> list[Tensor]:
        x, *rest = (t.to(device).requires_grad_() for t in inputs)
        y = merged_linear_nf4(x, merged.to(device), *rest, 2.0)
        return [y.detach(), *torch.autograd.grad(y, [x, *rest], dy.to(device))]

    for got, expected in zip(trained("cuda"), trained("cpu"), strict=True):
        assert got.is_cuda
        assert got.dtype == dtype
        error = (got.cpu().double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)
