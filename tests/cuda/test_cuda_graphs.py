"""Work that is captured in CUDA graphs when it repeats, and what makes captured graphs outdated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qlora_ext
from qlora_app.cuda_graphs import GraphCache, ModuleState


class Block(nn.Module):
    """Attention of one token per row over static keys, between 4-bit layers: what a step of decoding consists of."""

    def __init__(self, rows: int = 4, span: int = 16) -> None:
        super().__init__()
        self.project = nn.Linear(64, 64, bias=False)
        self.up = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("keys", torch.zeros(rows, span, 64))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x), device=x.device)
        y = self.project(self.norm(x))
        self.keys[rows, positions] = y
        visible = torch.arange(self.keys.shape[1], device=x.device) <= positions[:, None]
        keys = self.keys[: len(x)]
        y = nn.functional.scaled_dot_product_attention(y[:, None], keys, keys, visible[:, None])[:, 0]
        return x + self.up(y)


def block(device: str = "cuda") -> Any:
    torch.manual_seed(1)
    return qlora_ext.quantize_model(Block()).eval().to(device)


class Steps:
    """Steps of a block over static inputs and outputs, by graphs and eagerly."""

    def __init__(self, model: Any) -> None:
        self.model, self.graphs = model, GraphCache(torch.device("cuda"))
        self.x = torch.zeros(4, 64, device="cuda")
        self.positions = torch.zeros(4, dtype=torch.int64, device="cuda")
        self.y = torch.zeros(4, 64, device="cuda")

    def compute(self, rows: int) -> None:
        self.y[:rows] = self.model(self.x[:rows], self.positions[:rows])

    def are_equal(self, rows: int, position: int) -> bool:
        """Whether a step by ``graphs`` has the bits of the eager one, also in the keys, and changes no other rows."""
        self.x.normal_()
        self.positions.fill_(position)
        found = []
        before = self.model.keys.clone(), self.y.clone()
        for run in (lambda: self.compute(rows), lambda: self.graphs.run(rows, lambda: self.compute(rows))):
            for tensor, value in zip((self.model.keys, self.y), before, strict=True):
                tensor.copy_(value)
            run()
            found.append((self.model.keys.clone(), self.y.clone()))
        (keys, y), (graph_keys, graph_y) = found
        assert torch.equal(y[rows:], before[1][rows:])
        assert not torch.equal(y[:rows], before[1][:rows])
        return torch.equal(keys, graph_keys) and torch.equal(y, graph_y)


@pytest.mark.cuda
@torch.no_grad()
def test_replays_have_the_bits_of_the_eager_step() -> None:
    steps = Steps(block())
    assert all(steps.are_equal(rows, position) for position in range(3) for rows in (2, 4, 1))
    assert len(steps.graphs) == 3
    steps.model.up.bias.mul_(3)  # replays read weights where they are, as an optimizer leaves them
    assert steps.are_equal(2, 5)
    steps.graphs.clear()
    assert len(steps.graphs) == 0
    assert [(steps.are_equal(2, 6), len(steps.graphs)) for _ in range(3)] == [(True, 0), (True, 1), (True, 1)]
    assert steps.graphs.failure is None


@pytest.mark.cuda
@torch.no_grad()
def test_a_failed_capture_leaves_the_eager_step() -> None:
    steps = Steps(block())
    assert all(steps.are_equal(2, 0) for _ in range(2))
    hook = steps.model.up.register_forward_hook(lambda module, inputs, y: y * y.sum().sign().item())
    assert all(steps.are_equal(4, position) for position in range(3))
    assert "captur" in str(steps.graphs.failure)
    hook.remove()
    assert all(steps.are_equal(2, position) for position in range(2))  # captures have been given up
    assert len(steps.graphs) == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    other = Steps(steps.model)  # another one can capture
    assert all(other.are_equal(2, 0) for _ in range(3))
    assert (other.graphs.failure, len(other.graphs)) == (None, 1)


@pytest.mark.cuda
@torch.no_grad()
def test_errors_of_the_step_itself_are_raised_while_it_warms_up() -> None:
    graphs = GraphCache(torch.device("cuda"))

    def fails() -> None:
        raise KeyError("the step")

    for _ in range(2):
        with pytest.raises(KeyError, match="the step"):
            graphs.run(1, fails)
    assert graphs.failure is None
    calls: list[int] = []

    def fails_in_the_capture() -> None:
        calls.append(1)
        torch.zeros(1, device="cuda")
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("not twice")

    for _ in range(3):
        graphs.run(2, fails_in_the_capture)
    assert (graphs.failure, len(calls)) == ("'not twice'", 4)


def _replace_layer(model: Any) -> None:
    model.up = block("cpu").up


def _replace_parameter(model: Any) -> None:
    model.norm.weight = nn.Parameter(model.norm.weight.detach())


def _move(model: Any) -> None:
    model.project.weight.data = model.project.weight.data.clone()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.up.train(),
        lambda model: model.up.set_weight(model.up.weight4bit.map(torch.clone)),
        lambda model: model.norm.register_forward_hook(lambda *_: None),
        lambda model: model.norm.register_forward_pre_hook(lambda *_: None),
        lambda model: model.register_buffer("keys", torch.zeros(4, 16, 64)),
        _replace_layer,
        _replace_parameter,
        _move,
    ],
)
def test_changes_that_outdate_graphs(change: Callable[[Any], object]) -> None:
    model = block("cpu")
    state = ModuleState(model)
    assert (state.is_current(), state.is_training, state.hooks) == (True, False, [])
    with torch.no_grad():
        model.up.bias.add_(1)
    assert state.is_current()
    change(model)
    assert not state.is_current()
    assert ModuleState(model).is_current()


def test_hooks_of_all_modules() -> None:
    model = block("cpu")
    state = ModuleState(model)
    hook = nn.modules.module.register_module_forward_hook(print)
    try:
        assert not state.is_current()
        assert ModuleState(model).hooks == [print]
    finally:
        hook.remove()
    assert state.is_current()
