"""Gradients of x, bias, lora_a and lora_b alone: correct, and the same under autocast and checkpointing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import qlora_ext
from grouped_samples import KINDS
from samples import DEVICES, WAYS, by_function, by_operator, by_python, gradients, linear_sample, relative_error

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


def test_only_requested_gradients_are_computed() -> None:
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
    storages = {t.data_ptr() for t in (*s.differentiable, *s.w4.tensors.values())}
    copied = [t for t in saved if t.data_ptr() not in storages]
    assert [t.shape for t in copied] == [(3, 4)], [(t.shape, t.dtype) for t in copied]  # h


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


def jvp_by_hand(way, s, **tangents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and its tangent, computed with dual tensors."""
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(getattr(s, name), t) for name, t in tangents.items()}
        y, tangent = forward_ad.unpack_dual(way(dataclasses.replace(s, **dual)))
        return y, tangent


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("way", [by_operator, by_python])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_mode_by_x_and_bias(form: dict, way, requires_grad: bool) -> None:
    s = linear_sample(m=(2, 3), dtype=torch.float64, requires_grad=requires_grad, **form)
    tangents = {"x": torch.randn_like(s.x)}
    if s.bias is not None:
        tangents["bias"] = torch.randn_like(s.bias)
    for names in (["x"], list(tangents), list(tangents)[1:]):
        if not names:
            continue
        chosen = {name: tangents[name] for name in names}
        y, tangent = jvp_by_hand(way, s, **chosen)
        with torch.no_grad():
            step = dataclasses.replace(s, **{name: getattr(s, name) + t for name, t in chosen.items()})
            expected = way(step) - way(s)  # the layer is linear in x and bias
        torch.testing.assert_close(y, way(s))
        torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", [by_operator, by_python])
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_forward_mode_by_an_adapter_is_refused(name: str, way) -> None:
    s = linear_sample(dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=f"{name}: linear_nf4 has forward-mode derivatives for x and bias"):
        jvp_by_hand(way, s, **{name: torch.randn_like(getattr(s, name))})


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_over_the_backward_is_refused(kind: str) -> None:
    s = KINDS[kind](dtype=torch.float64)
    s.x.requires_grad_()
    y = s.forward()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="the backward of .*linear_nf4: forward-mode"),
    ):
        torch.autograd.grad(y, s.x, forward_ad.make_dual(torch.ones_like(y), torch.randn_like(y)))


def test_forward_mode_of_the_function_is_refused() -> None:
    s = linear_sample(dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="jvp function"):
        jvp_by_hand(by_function, s, x=torch.randn_like(s.x))


def test_forward_mode_under_autocast() -> None:
    s = linear_sample(m=3)
    dx = torch.randn_like(s.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, tangent = jvp_by_hand(by_operator, s, x=dx)
        expected = torch.ops.qlora.linear_nf4(dx, *s.args[1:8], None, *s.lora_args)
    assert y.dtype == tangent.dtype == torch.bfloat16
    assert torch.equal(tangent, expected)
