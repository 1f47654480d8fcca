"""Operators, modules and configurations reject out-of-bounds arguments by name, and compute correctly otherwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import qlora_ext
from qlora_ext import _C
from qlora_ext.nn import Embedding4bit, Linear4bit
from samples import DEVICES, linear_sample
from test_ops import OP_NAMES, named

OPS = torch.ops.qlora
REFUSED = (ValueError, RuntimeError, TypeError, OverflowError)
INTEGERS = [-(2**63), -(2**31), -1, 0, 1, 3, 2**20 + 1, 2**31, 2**32 + 64, 2**48, 2**62 + 1, 2**63 - 64, 2**63 - 1]
FLOATS = [math.nan, math.inf, -math.inf, 1e300, -1e300, -1e-300, 1.0 + 1e-9, 2.0**63]


def call(name: str, device: str, **changes: object) -> Any:
    return getattr(OPS, name)(**{**named(name, device), **changes})


def kinds(name: str, *types: str) -> list[str]:
    return [a.name for a in getattr(OPS, name).default._schema.arguments if str(a.type) in types]


INTEGER_ARGUMENTS = [(name, a) for name in OP_NAMES for a in kinds(name, "int", "SymInt") if a not in ("seed", "dtype")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", INTEGERS)
@pytest.mark.parametrize(("name", "argument"), INTEGER_ARGUMENTS)
def test_every_integer_is_bounded(name: str, argument: str, value: int, device: str) -> None:
    legal = (argument == "nested_block_size" and value in (1, 3)) and name == "quantize_absmax"
    if (argument, value) == ("max_rank", 0):  # the default
        call(name, device, max_rank=0)
    elif legal:
        assert call(name, device, **{argument: value})[1].numel() == math.ceil(300 / value)
    else:
        with pytest.raises(ValueError, match=rf"^({argument}|packed|absmax|nested_absmax): expected|^d?[xy]: the last"):
            call(name, device, **{argument: value})


@pytest.mark.parametrize("value", [*INTEGERS, 2**63 - 63, 40, 60, 200])
def test_a_number_that_is_no_dtype_is_refused(value: int) -> None:
    with pytest.raises(REFUSED):
        call("dequantize_nf4", "cpu", dtype=value)


TENSOR_ARGUMENTS = [(name, a) for name in OP_NAMES for a in kinds(name, "Tensor")[1:]]


@pytest.mark.parametrize(("name", "argument"), TENSOR_ARGUMENTS)
def test_none_is_no_tensor(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected a tensor, got None"):
        call(name, "cpu", **{argument: None})


NOT_DENSE = {
    "torch.sparse_coo": lambda: torch.zeros(5, 64).to_sparse(),
    "torch.sparse_csr": lambda: torch.zeros(5, 64).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2, 64), torch.zeros(3, 64)]),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(2, 64)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning", "ignore:Sparse:UserWarning")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense_are_rejected(kind: str) -> None:
    for name in OP_NAMES:
        for argument in kinds(name, "Tensor", "Optional[Tensor]"):
            if argument in named(name, "cpu"):
                with pytest.raises(ValueError, match=f"^{argument}: expected a dense tensor, got a {kind}"):
                    call(name, "cpu", **{argument: NOT_DENSE[kind]()})
    s = linear_sample(rank=0)
    for layer in (lambda x: qlora_ext.linear_nf4(x, s.w4), Linear4bit.from_linear(torch.nn.Linear(64, 48))):
        with pytest.raises(ValueError, match=f"^x: expected .*, got a {kind}"):
            layer(NOT_DENSE[kind]())


def test_a_dropout_that_is_no_number_is_named() -> None:
    s = linear_sample()
    for value in ("0.1", None, [0.1]):
        with pytest.raises(TypeError, match=r"^dropout_p: expected a probability from 0 to 1, got "):
            qlora_ext.linear_nf4(s.x, s.w4, s.bias, s.lora_a, s.lora_b, dropout_p=value)


@pytest.mark.parametrize("value", INTEGERS)
def test_any_seed_will_do(value: int) -> None:
    for name in ("linear_nf4", "linear_nf4_dx", "linear_nf4_dlora"):
        call(name, "cpu", seed=value)
    s = linear_sample(dropout_p=0.5)
    s.seed = value
    assert torch.equal(qlora_ext.linear_nf4(s.x, s.w4, s.bias, *s.lora_args), OPS.linear_nf4(*s.args))


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**64, [1], "1", 1.5])
def test_a_seed_beyond_64_bits_is_refused(value: object) -> None:
    s = linear_sample(dropout_p=0.5)
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits"):
        qlora_ext.linear_nf4(s.x, s.w4, s.bias, s.lora_a, s.lora_b, 1.0, 0.5, seed=value)


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize("value", FLOATS)
@pytest.mark.parametrize("argument", ["scaling", "dropout_p"])
@pytest.mark.parametrize("name", ["linear_nf4", "linear_nf4_dx", "linear_nf4_dlora"])
def test_every_float_is_bounded(name: str, argument: str, value: float, device: str) -> None:
    if argument == "scaling" and abs(value) < 1e38:
        assert all(torch.isfinite(t).all() for t in call(name, "cpu", scaling=value))
        return
    arguments = {**named(name, "cpu" if device == "meta" else device), argument: value}
    moved = [a.to("meta") if device == "meta" and isinstance(a, torch.Tensor) else a for a in arguments.values()]
    with pytest.raises(ValueError, match=rf"^{argument}: expected a (finite|probability)"):
        getattr(OPS, name)(*moved)


@pytest.mark.parametrize("value", [0, -1, 2**20 + 1, 2**63 - 1])
@pytest.mark.parametrize("argument", ["block_size", "nested_block_size"])
@pytest.mark.parametrize("name", OP_NAMES)
def test_fake_kernels_refuse_the_same_block_sizes(name: str, argument: str, value: int) -> None:
    arguments = named(name, "cpu")
    if argument not in arguments:
        return
    arguments[argument] = value
    moved = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments.values()]
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        getattr(OPS, name)(*moved)


SHAPES = [
    [2**62, 4],
    [2**32, 2**32],
    [2**63 - 1],
    [-1, 64],
    [-48, -64],
    [2**40, 2**40, 0],
    [0, 2**63 - 1],
    [2**21] * 3,
    [1] * 63 + [2**49],
    [3] * 65,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_product_of_sizes_wraps(shape: list[int], device: str) -> None:
    with pytest.raises(ValueError, match=r"^shape: expected (sizes|at most 2\^48 elements)"):
        call("dequantize_nf4", device, shape=shape)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_of_empty_tensors_are_bounded_too(device: str) -> None:
    byte, scales = torch.empty(0, dtype=torch.uint8, device=device), torch.empty(0, device=device)

    def linear(x: torch.Tensor, out_features: int) -> torch.Tensor:
        return OPS.linear_nf4(x, byte, scales, None, None, 64, 256, out_features, None, None, None, 1.0, 0.0, 0)

    wide = torch.empty(2**40, 0, device=device)
    assert linear(wide, 0).shape == (2**40, 0)  # immediately, because there is nothing to compute
    for x, out_features in ((wide, 2**30), (torch.empty(0, 2**40, device=device), 2**40), (wide.unsqueeze(0), 2**62)):
        with pytest.raises(ValueError, match=r"out_features: expected at most 2\^48 elements"):
            linear(x, out_features)
    with pytest.raises(ValueError, match=r"^x: expected at most 2\^48 elements"):
        linear(torch.empty(2**62, 0, device=device), 0)
    with pytest.raises(ValueError, match=r"^w: expected at most 2\^48 elements"):
        OPS.quantize_nf4(torch.empty(2**31, 2**31, 0, device=device), 64)
    lora = torch.empty(2**40, 0, device=device), torch.empty(0, 2**40, device=device)
    x, dy = torch.empty(2**20, 0, device=device), torch.empty(2**20, 0, device=device)
    with pytest.raises(ValueError, match=r"^lora_a: expected at most 2\^48 elements"):
        OPS.linear_nf4_dlora(dy, x, *lora, 1.0, 0.0, 0)
    assert [t.numel() for t in OPS.linear_nf4_dlora(dy, x, lora[0][:5], lora[1][:, :5], 1.0, 0.0, 0)] == [0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dims", [64, 65, 100, 1000])
def test_any_number_of_dimensions(dims: int, device: str) -> None:
    ones = [1] * (dims - 2)
    s = linear_sample(m=3, device=device)
    w = torch.randn(48, 64, device=device)
    flat, stacked = qlora_ext.quantize_nf4(w), qlora_ext.quantize_nf4(w.reshape(*ones, 48, 64))
    assert stacked.packed.shape == (*ones, 48, 32)
    assert stacked.dequantize().shape == (*ones, 48, 64)
    assert torch.equal(stacked.dequantize().reshape(48, 64), flat.dequantize())
    expected = OPS.linear_nf4(*s.args)
    y = OPS.linear_nf4(s.x.reshape(*ones, 3, 64), *s.args[1:])
    assert y.shape == (*ones, 3, 48)
    assert torch.equal(y.reshape(3, 48), expected)
    dx = OPS.linear_nf4_dx(*s.dx_args(y))
    assert dx.shape == (*ones, 3, 64)


@pytest.mark.parametrize("value", [True, 64.0, 0, -1, 2**20 + 1, 2**63 - 1, 10**30, None, "256", [256]])
def test_block_sizes_of_the_python_functions(value: Any) -> None:
    from_one = r"nested_block_size: expected an integer from 1 to 1048576, got"
    with pytest.raises(ValueError, match=from_one):
        qlora_ext.quantize_nf4(torch.zeros(4, 64), nested_block_size=value)
    with pytest.raises(ValueError, match=from_one):
        Linear4bit(64, 48, nested_block_size=value)
    with pytest.raises(ValueError, match=from_one):
        qlora_ext.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 8)), nested_block_size=value)
    if value != 64.0:
        with pytest.raises(ValueError, match=r"block_size: expected a power of two from 16 to 4096, got"):
            Linear4bit(64, 48, block_size=value)
    if isinstance(value, int) and abs(value) < 2**63 and value is not True:
        with pytest.raises(ValueError, match=from_one):
            _C.quantize_absmax(np.ones(300, np.float32), value)
        with pytest.raises(ValueError, match=from_one):
            _C.dequantize_absmax(np.ones(300, np.uint8), np.ones(1, np.float32), 0.0, value)


def test_the_largest_nested_block_is_one_block() -> None:
    w = torch.randn(48, 640)
    w4 = qlora_ext.quantize_nf4(w, nested_block_size=2**20)
    assert w4.nested_absmax.numel() == 1
    assert torch.equal(w4.dequantize(), qlora_ext.quantize_nf4(w, nested_block_size=480).dequantize())


@pytest.mark.parametrize("numel", [-1, 2**62, 2**63 - 1])
def test_the_numpy_functions_bound_their_count(numel: int) -> None:
    with pytest.raises(ValueError, match=r"^(numel|packed): expected"):
        _C.dequantize_nf4(np.zeros(4, np.uint8), np.ones(1, np.float32), numel)


@pytest.mark.parametrize("size", [-1, 1.5, True, None, "64", 2**47, 2**63 - 1])
def test_sizes_of_modules(size: Any) -> None:
    for make in (lambda: Linear4bit(size, 48), lambda: Linear4bit(48, size), lambda: Embedding4bit(size, 48)):
        with pytest.raises(ValueError, match=r"weight: expected (a list of integers|at most 2\^48 elements)"):
            make()


def test_a_weight_whose_parts_do_not_fit_is_not_taken() -> None:
    module = Linear4bit(64, 48)
    w4 = qlora_ext.quantize_nf4(torch.randn(48, 64), block_size=32)
    for part in ("packed", "absmax", "nested_absmax"):
        short = w4.replace(**{part: getattr(w4, part).reshape(-1)[:-1]})
        with pytest.raises(ValueError, match=rf"{'weight' if part == 'packed' else part}: expected"):
            module.set_weight(short)
        assert module.block_size == 64
    module.set_weight(w4)
    assert module.block_size == 32
