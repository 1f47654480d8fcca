"""Packed weights raise an error on arithmetic, and are moved, saved and compared like other tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import qlora_ext
from qlora_ext.nn import Embedding4bit, Linear4bit
from qlora_ext.no_arithmetic import PackedParameter, PackedTensor

X = torch.ones(3, 64)


def layer(double_quant: bool = True) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit.from_linear(nn.Linear(64, 32).requires_grad_(False), double_quant=double_quant)


def set_data(p: Tensor) -> None:
    p.data = torch.zeros(p.shape)


READING: dict[str, Callable[[Tensor], Any]] = {
    "matmul": lambda w: w @ X.T,
    "rmatmul": lambda w: X @ w,
    "transposed": lambda w: X @ w.T,
    "t()": lambda w: torch.mm(X, w.t()),
    "linear": lambda w: F.linear(X, w),
    "embedding": lambda w: F.embedding(torch.tensor([0]), w),
    "einsum": lambda w: torch.einsum("ij,kj->ik", X, w),
    "mean": lambda w: w.mean(),
    "sum": lambda w: w.sum(),
    "norm": lambda w: torch.linalg.vector_norm(w),
    "svd": lambda w: torch.linalg.svd(w),
    "twice": lambda w: w * 2,
    "one minus": lambda w: 1 - w,
    "delta": lambda w: torch.zeros(w.shape) + w,
    "float": lambda w: w.float(),
    "to": lambda w: w.to(torch.bfloat16),
    "data to": lambda w: w.data.to(torch.bfloat16),
    "detached": lambda w: w.detach() * 0.9,
}
CHANGING: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "clamp_": lambda w: w.clamp_(0, 3),
    "iadd": lambda w: w.__iadd__(1),
    "data lerp_": lambda w: w.data.lerp_(w.data, 0.1),
    "foreach": lambda w: torch._foreach_mul_([w.detach()], 2),
    "copy_": lambda w: w.data.copy_(torch.zeros(w.shape)),
    "set data": set_data,
    "init": nn.init.normal_,
    "EMA": lambda w: w.data.copy_(0.9 * w.data + 0.1 * w.data),
}


@pytest.mark.parametrize("use", [*READING, *CHANGING])
def test_arithmetic_is_refused_and_changes_nothing(use: str) -> None:
    module = layer()
    before = module.weight.numpy().copy()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layer\.dequantize\(\)"):
        (READING | CHANGING)[use](module.weight)
    assert (module.weight.numpy() == before).all()


@pytest.mark.parametrize("use", ["mul_", "data lerp_", "foreach", "EMA"])
def test_scales_refuse_it_too(use: str) -> None:
    for absmax in (layer(True).absmax, layer(False).absmax):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"layer\.dequantize\(\)"):
            CHANGING[use](absmax)
    with pytest.raises(RuntimeError, match="bfloat16 in the place of torch.float32"):
        layer(False).absmax.data.copy_(torch.zeros(32, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "use",
    [
        *(lambda w, use=use: READING[use](w) for use in ("matmul", "rmatmul", "linear", "twice", "one minus")),
        len,
        list,
        np.asarray,
        torch.mean,
        lambda w: -w,
        lambda w: w[0],
    ],
)
def test_an_nf4_weight_refuses_arithmetic(use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"NF4Weight.*dequantize\(\)"):
        use(layer().weight4bit)
    assert layer().weight4bit  # it has no length, but is true


def test_moving_saving_and_comparing_work() -> None:
    module = layer()
    weight, y = module.weight, module(X)
    assert type(weight) is PackedParameter
    assert type(weight.data) is PackedTensor
    assert torch.equal(weight, weight.clone())
    assert (weight != weight).float().mean() == 0
    assert (weight >> 4).dtype == torch.uint8
    assert weight[0].shape == (32,)
    assert weight.to("meta").shape == (32, 32)
    assert torch.zeros_like(weight, dtype=torch.float32).dtype == torch.float32
    state = module.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert {type(t) for t in read.values()} == {Tensor} == {type(t) for t in copy.deepcopy(state).values()}
    for others in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), layer().double().float()):
        assert type(others.weight) is PackedParameter
        assert torch.equal(others(X), y)
    for assign in (False, True):
        other = Linear4bit(64, 32, compute_dtype=torch.float32)
        other.load_state_dict(read if assign else state, assign=assign)
        assert type(other.weight) is PackedParameter
        assert torch.equal(other(X), y)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    module(X.clone().requires_grad_()).sum().backward()
    optimizer.step()
    assert torch.equal(module(X), y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Embedding4bit.from_embedding(nn.Embedding(16, 64))
        self.frozen = layer(double_quant=False)
        self.trained = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.trained(self.frozen(self.table(ids)))
        return y


AVERAGES: dict[str, Any] = {
    "SWA": {},
    **{f"EMA {d}": {"multi_avg_fn": get_ema_multi_avg_fn(d)} for d in (0.9, 0.95, 0.999, 0.9999)},
    "EMA one by one": {"avg_fn": get_ema_avg_fn(0.9)},
    "with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_is_one_of_the_trained_weights(average: str) -> None:
    torch.manual_seed(0)
    model, ids = Model(), torch.arange(16)
    averaged = AveragedModel(model, **AVERAGES[average])
    expected = AveragedModel(model.trained, **AVERAGES[average])
    for _ in range(10):
        with torch.no_grad():
            model.trained.weight += 0.1
        averaged.update_parameters(model)
        expected.update_parameters(model.trained)
    assert torch.equal(averaged.module.trained.weight, expected.module.weight)
    assert averaged.n_averaged == 10
    for (_, a), (_, b) in zip(qlora_ext.nn.layers_of(averaged), qlora_ext.nn.layers_of(model), strict=True):
        for name, t in b.packed_state().items():
            assert torch.equal(a.packed_state()[name], t)
            assert a.packed_state()[name] is not t
    model.trained = averaged.module.trained
    assert torch.allclose(averaged(ids), model(ids))


def average_by_hand(average: Model, model: Model) -> None:
    for a, p in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        a.copy_(0.9 * a + 0.1 * p)


def test_an_average_by_hand_is_refused() -> None:
    model = Model()
    average = copy.deepcopy(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="trainable parameters only"):
        average_by_hand(average, model)


def test_a_compiled_layer_is_one_graph() -> None:
    module = layer()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = X.clone().requires_grad_()
    assert torch.equal(compiled(x), module(x))
    (a,) = torch.autograd.grad(compiled(x).sum(), x)
    (b,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(a, b)


@pytest.mark.parametrize("use", ["matmul", "rmatmul", "linear", "mean", "twice", "mul_", "clamp_"])
def test_arithmetic_is_refused_in_a_compiled_function(use: str) -> None:
    module = layer()
    before = module.weight.numpy().copy()
    torch._dynamo.reset()
    function = torch.compile(lambda m: (READING | CHANGING)[use](m.weight), backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match=r"layer\.dequantize\(\)"):
        function(module)
    assert (module.weight.numpy() == before).all()


def test_a_compiled_function_moves_and_compares() -> None:
    module = layer()
    torch._dynamo.reset()
    function = torch.compile(
        lambda m: (m.weight >> 4, m.weight.clone(), m.weight.dtype), backend="eager", fullgraph=True
    )
    high, copied, dtype = function(module)
    assert torch.equal(high, module.weight.clone() >> 4)
    assert torch.equal(copied, module.weight)
    assert dtype == torch.uint8


def test_onnx_export_is_refused_in_one_sentence() -> None:
    module = nn.Sequential(layer())
    for model in (module, torch.export.export(module, (X,))):
        with pytest.raises(ValueError, match="ONNX export of 4-bit layers is not supported"):
            torch.onnx.export(model, (X,), io.BytesIO())
