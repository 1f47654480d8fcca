"""Linear4bit as a module: the packed state keeps its bits under all of torch's operations on modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qlora_ext
from qlora_ext.nn import Linear4bit, quantize_model
from tiny_experts import Experts


def layer(dtype: torch.dtype = torch.bfloat16) -> Linear4bit:
    return Linear4bit.from_linear(nn.Linear(160, 48, dtype=dtype))


def test_dtype_changes_reach_bias_decoded_weight_and_compute_dtype() -> None:
    module = layer()
    for dtype in (torch.float16, torch.float64):
        module.to(dtype)
        assert module.bias.dtype == module.dequantize().dtype == module.compute_dtype == dtype
    bare = Linear4bit(64, 8, bias=False).to(torch.float32)
    assert bare.compute_dtype == torch.float32


def test_states_of_other_sizes_and_dense_ones_are_refused() -> None:
    for strict, assign in itertools.product((True, False), repeat=2):
        with pytest.raises(RuntimeError, match=r"weight: expected torch.uint8 \[48, 160\].*got torch.uint8 \[48, 80\]"):
            Linear4bit(320, 48).load_state_dict(layer().state_dict(), strict=strict, assign=assign)
    with pytest.raises(RuntimeError, match=r"weight: expected torch.uint8 .* got torch.bfloat16"):
        layer().load_state_dict(nn.Linear(160, 48, dtype=torch.bfloat16).state_dict())


def test_check_form_finds_tensors_set_from_outside() -> None:
    module = layer()
    module.weight.absmax = torch.zeros(7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"up.absmax: expected torch.uint8 \[120\]"):
        module.check_form(prefix="up.")


def test_evaluation_during_training_changes_nothing() -> None:
    x = torch.randn(4, 160)

    def gradient(evaluate: bool) -> Tensor:
        torch.manual_seed(0)
        module = layer(dtype=torch.float32).train()
        if evaluate:
            module.eval()
            with torch.no_grad():
                module(x)
            with torch.inference_mode():
                module(x[:1])
            module.train()
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(True), gradient(False))


def test_quantize_model_shares_skips_and_keeps_tied() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 64)
            self.a = nn.Linear(64, 64)
            self.b = self.a
            self.block = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            self.head = nn.Linear(64, 32, bias=False)
            self.head.weight = self.embed.weight
            self.lm_head = nn.Linear(64, 32)

    model = quantize_model(Model(), skip=("lm_head", "block.2"))
    assert isinstance(model.a, Linear4bit)
    assert model.a is model.b
    assert isinstance(model.block[0], Linear4bit)
    assert [type(m) for m in (model.block[2], model.head, model.lm_head)] == [nn.Linear] * 3
    assert model.head.weight is model.embed.weight


def test_activations_reach_every_product() -> None:
    """Of layers, with LoRA, merged weights, and tied heads; and layers show them if they are not exact."""
    layer = Linear4bit.from_linear(nn.Linear(128, 48), activations="int8")
    x, a, b = torch.randn(70, 128), torch.randn(4, 128), torch.randn(48, 4)
    w4, bias = layer.weight, layer.bias

    def same(y: Tensor, *lora: Tensor) -> None:
        assert torch.equal(y, qlora_ext.linear_nf4(x, w4, bias, *lora, activations="int8"))
        assert not torch.equal(y, qlora_ext.linear_nf4(x, w4, bias, *lora))

    same(layer(x))
    same(layer.fused_forward(x, a, b, 0.5), a, b, 0.5)
    same(layer.merged_forward(x, w4, a, b))
    assert repr(layer).endswith("double_quant=True, activations=int8)")
    layer.activations = "exact"
    assert torch.equal(layer(x), qlora_ext.linear_nf4(x, w4, bias))
    assert "activations" not in repr(layer)
    layer.activations = "int4"
    with pytest.raises(ValueError, match="activations: expected exact or int8, got int4"):
        layer(x)

    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "up": nn.Linear(64, 64), "lm_head": nn.Linear(64, 32)})
    model["lm_head"].weight = model["embed"].weight
    quantize_model(model, embeddings=True, activations="int8")
    assert [m.activations for m in model.values()] == ["int8"] * 3
    assert quantize_model(nn.Linear(64, 64), activations="int8").activations == "int8"


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_is_the_decoded_layer(bias: bool) -> None:
    linear = nn.Linear(64, 32, bias=bias)
    module = Linear4bit.from_linear(linear)
    dense = module.to_linear()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, module.dequantize(torch.float32))
    x = torch.randn(5, 64)
    torch.testing.assert_close(dense(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: qlora_ext.quantize_model(3), "model: expected an nn.Module, got int"),
        (lambda: qlora_ext.quantize_model(nn.Linear(4, 4), skip="lm_head"), "skip: expected names of modules, got 'lm"),
        (lambda: qlora_ext.quantize_model(nn.Linear(4, 4), skip=3), "skip: expected names of modules, got 3"),
        (lambda: qlora_ext.quantize_model(nn.Linear(4, 4), skip=[3]), r"skip: expected names of modules, got \(3,\)"),
        (lambda: qlora_ext.nn.Linear4bit(4, 4, compute_dtype=torch.int8), "compute_dtype: expected a floating-point"),
        (lambda: qlora_ext.nn.Linear4bit(4, 4, compute_dtype="bfloat16"), "compute_dtype: .* got 'bfloat16'"),
        (lambda: qlora_ext.nn.Embedding4bit(4, 64, padding_idx=1.5), "padding_idx: expected a row number, got 1.5"),
        (lambda: qlora_ext.linear_nf4(3, qlora_ext.quantize_nf4(torch.zeros(4, 4))), "x: expected a torch.Tensor, got"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], object], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: Linear4bit(64, 64, activations="int4"),
        lambda: Linear4bit.from_linear(nn.Linear(64, 64), activations="int4"),
        lambda: quantize_model(nn.Linear(64, 64), activations="int4"),
        lambda: qlora_ext.nn.Experts4bit.from_experts(Experts(), activations="int4"),
    ],
)
def test_unknown_activations_are_named(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="activations: expected exact or int8, got 'int4'"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_meta_device_there_are_shapes(dtype: torch.dtype) -> None:
    x = torch.empty(2, 3, 64, dtype=dtype, device="meta", requires_grad=True)
    for layer in (Linear4bit(64, 48, device="meta"), Linear4bit.from_linear(nn.Linear(64, 48)).to("meta")):
        a, b = torch.empty(4, 64, device="meta", requires_grad=True), torch.empty(48, 4, device="meta")
        y = layer.fused_forward(x, a, b, dropout_p=0.5)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 48), dtype, "meta")
        y.sum().backward()
        assert (x.grad.shape, a.grad.shape) == (x.shape, a.shape)
    with pytest.raises(ValueError, match=r"packed: expected on the device of x \(meta\), got cpu"):
        Linear4bit.from_linear(nn.Linear(64, 48))(x)
    with pytest.raises(ValueError, match=r"packed: expected on the device of x \(cpu\), got meta"):
        layer(torch.randn(2, 64))
