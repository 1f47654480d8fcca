"""Gradients: right, for x, bias, lora_a and lora_b only, and the same under autocast and checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import qlora_ext
from samples import DEVICES, WAYS, by_function, by_python, gradients, linear_sample, relative_error

FORMS = [{}, {"rank": None}, {"bias": False}, {"dropout_p": 0.4}, {"rank": 1, "double_quant": False}, {"rank": 0}]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck(way, form: dict) -> None:
    s = linear_sample(m=(2, 2), n=6, k=34, dtype=torch.float64, requires_grad=True, **form)
    torch.autograd.gradcheck(lambda *_: way(s), s.differentiable)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_against_the_oracle(form: dict, device: str) -> None:
    s = linear_sample(m=(2, 5), device=device, requires_grad=True, **form)
    y = by_python(s)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert relative_error(s.x.grad, s.expected_dx(dy)) < 1e-6
    if s.bias is not None:
        assert relative_error(s.bias.grad, dy.cpu().double().sum((0, 1)).numpy()) < 1e-6
    if s.lora_a is not None:
        for got, expected in zip((s.lora_a.grad, s.lora_b.grad), s.expected_dlora(dy), strict=True):
            assert relative_error(got, expected) < 1e-5


def test_only_what_is_asked_for_is_computed() -> None:
    s = linear_sample(requires_grad=True)
    s.x, s.bias = s.x.detach(), s.bias.detach()
    by_python(s).sum().backward()
    assert s.x.grad is None
    assert s.bias.grad is None
    assert s.lora_a.grad is not None
    assert s.lora_b.grad is not None


def test_a_frozen_layer_needs_no_graph() -> None:
    s = linear_sample()
    assert not by_python(s).requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_nothing_dequantized_is_saved(way) -> None:
    s = linear_sample(m=3, n=256, k=512, rank=4, dropout_p=0.5, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        way(s)
    storages = {t.data_ptr() for t in (*s.differentiable, *s.w4.packed_args()[:4])}
    copied = [t for t in saved if t.data_ptr() not in storages]
    assert saved
    assert not copied, [(t.shape, t.dtype) for t in copied]


def test_a_second_derivative_is_refused() -> None:
    s = linear_sample(requires_grad=True)
    (dx,) = torch.autograd.grad(by_function(s).sum(), s.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(dx.sum(), s.x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_autocast_gradients_reach_float32_parameters(way, device: str) -> None:
    s = linear_sample(m=3, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = way(s)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for t in s.differentiable)
    assert relative_error(s.x.grad, s.expected_dx(torch.ones_like(s.x[:, :1].expand(3, 48)))) < 1e-2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_same_dropout(use_reentrant: bool) -> None:
    s = linear_sample(m=3, dropout_p=0.5, requires_grad=True)

    def layer(x):
        return qlora_ext.linear_nf4(x, s.w4, s.bias, s.lora_a, s.lora_b, s.scaling, s.dropout_p)

    torch.manual_seed(5)
    eager = gradients(lambda: layer(s.x), s)
    torch.manual_seed(5)
    replayed = gradients(lambda: checkpoint(layer, s.x, use_reentrant=use_reentrant), s)
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))


def test_manual_seed_reproduces_dropout_and_draws_differ() -> None:
    s = linear_sample(m=3, dropout_p=0.5)

    def draw():
        return qlora_ext.linear_nf4(s.x, s.w4, None, s.lora_a, s.lora_b, 1.0, 0.5)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
