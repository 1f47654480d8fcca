"""Weights whose columns are stored in an order of their own compute like the dense weight."""

from __future__ import annotations

import copy

import pytest
import torch

from checkpoint_samples import gptq
from qlora_ext import Form, linear_nf4
from qlora_ext.checkpoints import format_of
from qlora_ext.merging.codes import merged_weight, retained_update, with_nearest_codes, with_update
from qlora_ext.nn import Linear4bit
from qlora_ext.weight import Weight4bit

N, K = 24, 256


def reordered(dtype: torch.dtype = torch.float32) -> tuple[Weight4bit, torch.Tensor]:
    """The weight, and its values."""
    sample = gptq((N, K), 64, symmetric=False, desc_act=True)
    sample.tensors["scales"] = (torch.rand(4, N) * 0.1 + 0.01).half()
    kind, settings = format_of(sample.config)
    w4 = kind.read(sample.tensors, sample.shape, dtype, settings, "up_proj")
    assert w4.form.reordered
    return w4, torch.from_numpy(sample.values)


def layer_of(w4: Weight4bit) -> Linear4bit:
    layer = Linear4bit(K, N, False, torch.float32, **w4.form.keywords)
    layer.set_weight(w4)
    return layer


def test_products_and_gradients() -> None:
    w4, w = reordered()
    x, a = torch.randn(3, 2, K, requires_grad=True), torch.randn(4, K, requires_grad=True)
    b = torch.randn(N, 4, requires_grad=True)
    expected = x @ w.T + 0.5 * (x @ a.T) @ b.T
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, a, b), dy)
    for y in (linear_nf4(x, w4, None, a, b, 0.5), layer_of(w4).fused_forward(x, a, b, 0.5)):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        for found, reference in zip(torch.autograd.grad(y, (x, a, b), dy), gradients, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-3)


def test_an_adapter_for_each_row() -> None:
    w4, w = reordered()
    x, a, b = torch.randn(3, K), torch.randn(2, 4, K), torch.randn(2, N, 4)
    y = linear_nf4(x, w4, None, [*a], [*b], adapter_of_row=torch.tensor([1, -1, 0]))
    expected = x @ w.T
    expected[0] += x[0] @ a[1].T @ b[1].T
    expected[2] += x[2] @ a[0].T @ b[0].T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_encoding_under_the_scales_of_the_weight() -> None:
    w4, w = reordered()
    assert torch.equal(with_nearest_codes(w4, w).dequantize(), w)
    a, b = torch.randn(4, K), torch.randn(N, 4) * 0.02
    for merged in (merged_weight(w4, a, b, 1.0), with_update(w4, w + b @ a)):
        retained, total = retained_update(b @ a, w, merged.dequantize(torch.float32))
        assert 0.8 * total < retained < 1.2 * total


def test_the_order_is_a_part_of_the_state() -> None:
    w4, w = reordered()
    layer = layer_of(w4)
    assert layer.column_order is not None
    again = Linear4bit(K, N, False, torch.float32, **layer.form.keywords)
    again.load_state_dict(layer.state_dict())
    for copied in (again, copy.deepcopy(layer), layer_of(w4).half().float()):
        assert torch.equal(copied.weight4bit.dequantize(torch.float32), w)
        assert torch.equal(copied.to_linear(torch.float32).weight, w)
    plain = Linear4bit(K, N, False, torch.float32, **{**layer.form.keywords, "reordered": False})
    with pytest.raises(RuntimeError, match="which has no column_order"):
        plain.load_state_dict(layer.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="column_order"):
        again.load_state_dict(plain.state_dict())
    plain.set_weight(w4)  # takes over the form
    assert torch.equal(plain.dequantize(torch.float32), w)


def test_inputs_of_another_width_are_rejected() -> None:
    w4, _ = reordered()
    for width in (K // 2, 2 * K):
        for call in (layer_of(w4), lambda x: linear_nf4(x, w4)):
            with pytest.raises(ValueError, match="^x: "):
                call(torch.randn(3, width))


def test_stacks_are_in_order() -> None:
    with pytest.raises(ValueError, match="expected columns in order in a stack of 2 matrices"):
        Form("int4", "float16", reordered=True).tensors((N, K), (2,))
