"""``FlopCounterMode`` counts 4-bit layers like the dense layers that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qlora_ext.nn import Experts4bit, Linear4bit
from tiny_experts import Experts, routing


def count(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_a_step_of_a_linear_layer(shape: tuple[int, ...], rank: int) -> None:
    layer = Linear4bit.from_linear(nn.Linear(64, 48, bias=False))
    w = layer.dequantize(torch.float32)
    a, b = (torch.randn(*size, requires_grad=True) for size in ((rank, 64), (48, rank)))
    x = torch.randn(*shape, 64, requires_grad=True)
    lora = (a, b) if rank else ()

    def dense() -> Tensor:
        return x @ w.T + ((x @ a.T) @ b.T if rank else 0.0)

    assert count(lambda: layer.fused_forward(x, *lora)) == count(dense)
    tokens = x.numel() // 64
    again = 2 * tokens * rank * (64 + 48)  # upper bound of what the backward recomputes
    step, expected = (count(lambda f=f: f().sum().backward()) for f in (lambda: layer.fused_forward(x, *lora), dense))
    assert expected <= step <= expected + again


def test_experts_count_the_rows_that_they_see() -> None:
    module = Experts4bit.from_experts(Experts())
    index, weights = routing(tokens=11, k=2)
    assert count(lambda: module(torch.randn(11, 64), index, weights)) == 2 * 22 * (96 * 64 + 64 * 48)
