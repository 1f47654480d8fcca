"""Weights of every form are streamed and lent with all their tensors."""

from __future__ import annotations

import pathlib

import pytest
import safetensors.torch as safetensors
import torch
from torch import Tensor, nn

from forms import FORMS, random_weight
from qlora_ext.adapters import stack_adapters
from qlora_ext.nn import Experts4bit, ExpertsLora, Linear4bit
from qlora_ext.streaming import stream, streaming_of
from qlora_ext.weight import Weight4bit
from tiny_experts import Experts, routing

LAYERS = 4


class Layered(nn.Module):
    """Linear layers, or experts, in a module list."""

    def __init__(self, weights: list[Weight4bit]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for w4 in weights:
            if w4.shape[0] == 5:
                layer = Experts4bit(Experts(), torch.float64, **w4.form.keywords)
                layer.set_packed("gate_up_proj", w4)
                layer.set_packed("down_proj", random_weight(w4.form, (5, 64, 48)))
            else:
                layer = Linear4bit(64, 64, False, torch.float64, **w4.form.keywords)
                layer.set_weight(w4)
            self.layers.append(layer)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, *more)
        return x


def from_disk(model: nn.Module, path: pathlib.Path) -> nn.Module:
    """``model`` with its state mapped from a file, and streamed from there."""
    safetensors.save_file(model.state_dict(), path)
    model.load_state_dict(safetensors.load_file(path), assign=True)
    return stream(model, source="disk")


def two_adapters(tokens: int) -> dict[str, ExpertsLora]:
    """Adapters of which each token uses one."""
    a, b = (
        [torch.randn(5, *shape).double() for shape in shapes] for shapes in (((2, 64), (3, 64)), ((96, 2), (96, 3)))
    )
    return {"gate_up_proj": ExpertsLora(stack_adapters(a, b), None, adapter_of_row=torch.arange(tokens) % 2)}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
def test_a_streamed_model_has_the_same_bits(name: str, experts: bool, tmp_path: pathlib.Path) -> None:
    shape = (5, 96, 64) if experts else (64, 64)
    weights = [random_weight(FORMS[name], shape, seed) for seed in range(LAYERS)]
    resident = Layered(weights)
    streamed = from_disk(Layered(weights), tmp_path / "state.safetensors")
    assert len(streaming_of(streamed).slots) == 2
    for tokens in (1, 7):
        more = (*routing(tokens), two_adapters(tokens)) if experts else ()
        x = torch.randn(tokens, 64, dtype=torch.float64, requires_grad=True)
        y, expected = streamed(x, *more), resident(x, *more)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    for layer, w4 in zip(streamed.layers, weights, strict=True):
        read = layer.packed_weight("gate_up_proj" if experts else "weight")
        assert read.form == w4.form
        assert all(torch.equal(t, w4.tensors[key]) for key, t in read.tensors.items())


@pytest.mark.parametrize("name", FORMS)
def test_experts_compute_with_it(name: str) -> None:
    (experts,) = Layered([random_weight(FORMS[name], (5, 96, 64))]).layers
    dense = experts.to_experts(torch.float32).double()
    x, routed = torch.randn(11, 64, dtype=torch.float64), routing()
    torch.testing.assert_close(experts(x, *routed), dense(x, *routed))
    lora = ExpertsLora(torch.randn(5, 4, 64).double(), torch.randn(5, 96, 4).double().requires_grad_())
    y = experts(x, *routed, {"gate_up_proj": lora})
    y.sum().backward()
    with torch.no_grad():
        dense.gate_up_proj += lora.b @ lora.a
    torch.testing.assert_close(y, dense(x, *routed))
    assert lora.b.grad.isfinite().all()
    assert lora.b.grad.any()
