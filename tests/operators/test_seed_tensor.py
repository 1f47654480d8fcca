"""Dropout's seed as a tensor on the device: the masks of the same integer seed, and new ones at each graph replay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import qlora_ext
from grouped_samples import KINDS
from samples import DEVICES, linear_sample

OPS = torch.ops.qlora
SEEDS = [0, 1234, -5, 2**63 - 1]


def seed_on(device: str, value: int = 1234) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kind", "m"), [("linear", 3), ("linear", 200), ("experts", 8)])
def test_every_operator_draws_the_mask_of_the_number(kind: str, m: int, seed: int, device: str) -> None:
    s = dataclasses.replace(KINDS[kind](m, 48, 64, device=device, dropout_p=0.4), seed=seed)
    dy = s.dy()
    expected = s.forward(), s.dx(dy), *s.dlora(dy)
    leaves = [t.requires_grad_() for t in s.differentiable]
    by_number = torch.autograd.grad(s.forward(), leaves, dy)
    s.seed = 77
    assert not torch.equal(s.forward(), expected[0])
    s.seed_tensor = seed_on(device, seed)
    assert all(map(torch.equal, (s.forward(), s.dx(dy), *s.dlora(dy)), expected))
    assert all(map(torch.equal, torch.autograd.grad(s.forward(), leaves, dy), by_number))


@pytest.mark.parametrize("device", ["meta", *DEVICES])
@pytest.mark.parametrize("wrong", [torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor([1])])
def test_invalid_seeds_are_rejected(wrong: torch.Tensor, device: str) -> None:
    s = linear_sample(2, device="cpu", dropout_p=0.5)
    args = [
        a.to(device) if isinstance(a, torch.Tensor) else a
        for a in (s.x, *s.w4.operands(48, s.bias, *s.lora_args, wrong))
    ]
    with pytest.raises(ValueError, match="^seed_tensor: expected a 0-dim int64 tensor, got"):
        OPS.linear_nf4(*args)


def test_a_seed_on_another_device_is_refused() -> None:
    s = linear_sample(2, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"seed_tensor: expected on the device of x \(cpu\), got meta"):
        OPS.linear_nf4(s.x, *s.w4.operands(48, s.bias, *s.lora_args, seed_on("meta")))


@pytest.mark.parametrize("device", DEVICES)
def test_manual_seed_reproduces_a_layer_whose_graph_has_no_break(device: str) -> None:
    torch._dynamo.reset()
    layer = qlora_ext.nn.Linear4bit.from_linear(torch.nn.Linear(64, 48)).to(device)
    lora_a, lora_b = torch.randn(4, 64, device=device), torch.randn(48, 4, device=device)
    x = torch.randn(3, 64, device=device)

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer.fused_forward(x, lora_a, lora_b, 1.0, 0.5)

    explained = torch._dynamo.explain(run)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch.manual_seed(1)
    first, second = run(x), run(x)
    torch.manual_seed(1)
    assert torch.equal(run(x), first)
    assert not torch.equal(first, second)


@pytest.mark.cuda
@pytest.mark.parametrize("m", [3, 200])
def test_a_captured_step_draws_anew_at_each_replay(m: int) -> None:
    """Forward and backward of one replay share a mask: y is linear in x, so <dy, y> = <dx, x>."""
    s = linear_sample(m, 48, 64, device="cuda", bias=False, dropout_p=0.5)
    x = s.x.clone().requires_grad_()
    dy = torch.randn(m, 48, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = qlora_ext.linear_nf4(x, s.w4, None, s.lora_a, s.lora_b, 1.0, 0.5)
        return y, torch.autograd.grad(y, x, dy)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # as PyTorch requires, the work before a capture runs on a side stream
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.allclose((dy * y).sum(), (dx * x).sum(), rtol=1e-4, atol=1e-3)
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
