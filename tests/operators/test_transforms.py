"""torch.func and forward-mode AD at every public entry point: the correct derivative or an error, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import qlora_ext
from qlora_ext._library import OPERATORS
from qlora_ext.nn import Embedding4bit, Experts4bit, ExpertsLora, Linear4bit
from samples import linear_sample
from tiny_experts import Experts, routing

OPS = torch.ops.qlora
S = linear_sample(5, 48, 64)
PACKED = S.w4.operands()[:6]
W = S.w4.dequantize(torch.float32)
LORA = S.lora_a, S.lora_b, 0.5, 0.0, 0


def layer(x: Tensor, lora_a: Tensor = S.lora_a, lora_b: Tensor = S.lora_b, bias: Tensor | None = S.bias) -> Tensor:
    return qlora_ext.linear_nf4(x, S.w4, bias, lora_a, lora_b, 0.5)


def dense(x: Tensor, lora_a: Tensor = S.lora_a, lora_b: Tensor = S.lora_b, bias: Tensor = S.bias) -> Tensor:
    return x @ W.T + 0.5 * (x @ lora_a.T) @ lora_b.T + bias


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def tangent_of(f: Callable[[Tensor], Any], x: Tensor, way: str) -> Tensor:
    t = torch.linspace(-1, 1, x.numel()).view_as(x)
    if way == "jvp":
        return torch.func.jvp(f, (x,), (t,))[1]
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


ways = pytest.mark.parametrize("way", ["jvp", "make_dual"])


@ways
@pytest.mark.parametrize("trains", [False, True])
def test_the_tangent_goes_through_the_layer(way: str, trains: bool) -> None:
    for p in (S.lora_a, S.lora_b):
        p.requires_grad_(trains)
    try:
        for x in (S.x, S.x.clone().requires_grad_()):
            close(tangent_of(layer, x, way), tangent_of(dense, x, way))
        bias = [tangent_of(lambda b, f=f: f(S.x, bias=b), S.bias, way) for f in (layer, dense)]
        close(*bias)
    finally:
        for p in (S.lora_a, S.lora_b):
            p.requires_grad_(False)


@ways
def test_the_tangent_goes_through_modules(way: str) -> None:
    module = Linear4bit.from_linear(nn.Linear(64, 48))
    close(tangent_of(module, S.x, way), tangent_of(module.to_linear(), S.x, way))
    experts = Experts4bit.from_experts(Experts())
    index, weights = routing()
    x = torch.randn(11, 64)
    lora = {"down_proj": ExpertsLora(torch.randn(5, 2, 48), torch.randn(5, 64, 2))}
    by_weights = [tangent_of(lambda w, f=f: f(x, index, w), weights, way) for f in (experts, experts.to_experts())]
    close(*by_weights)
    with pytest.raises(NotImplementedError, match="grouped_linear_nf4: forward-mode AD"):
        tangent_of(lambda x: experts(x, index, weights, lora), x, way)


@ways
def test_the_tangent_goes_through_lora(way: str) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(64, 48))
    twin = peft.get_peft_model(qlora_ext.quantize_model(model), peft.LoraConfig(target_modules=["0"]))
    nn.init.normal_(twin.base_model.model[0].lora_B["default"].weight)
    twin.requires_grad_(False)
    expected = torch.func.vjp(twin, S.x)[1]  # y is linear in x: <dy, tangent> = <dx, t>
    dy, t = torch.randn(5, 48), torch.linspace(-1, 1, S.x.numel()).view_as(S.x)
    close((dy * tangent_of(twin, S.x, way)).sum(), (expected(dy)[0] * t).sum())


OFFSETS = torch.tensor([2, 5])
STACK = tuple(None if t is None else torch.stack([t, t]) if isinstance(t, Tensor) else t for t in PACKED)
DY, A2, B2 = torch.randn(5, 48), torch.randn(2, 4, 64), torch.randn(2, 48, 4)
REFUSING: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "linear_nf4: lora_a": (lambda a: OPS.linear_nf4(S.x, *PACKED, 48, None, a, *LORA[1:]), S.lora_a),
    "linear_nf4: nested_absmax": (
        lambda t: OPS.linear_nf4(S.x, *PACKED[:2], t, *PACKED[3:], 48, None, *LORA),
        PACKED[2],
    ),
    "linear_nf4_dx": (lambda dy: OPS.linear_nf4_dx(dy, *PACKED, 64, *LORA), DY),
    "linear_nf4_dlora: dy": (lambda dy: OPS.linear_nf4_dlora(dy, S.x, *LORA), DY),
    "linear_nf4_dlora: x": (lambda x: OPS.linear_nf4_dlora(DY, x, *LORA), S.x),
    "linear_dense": (lambda x: OPS.linear_dense(x, W.bfloat16()), S.x),
    "linear_dense_dx": (lambda dy: OPS.linear_dense_dx(dy, W.bfloat16()), DY),
    "dequantize_absmax": (lambda t: OPS.dequantize_absmax(PACKED[1], t, PACKED[3], 256), PACKED[2]),
    "quantize_nf4": (lambda w: OPS.quantize_nf4(w, 64), W),
    "quantize_absmax": (lambda t: OPS.quantize_absmax(t, 256), torch.rand(300)),
    "search_absmax_nf4": (lambda w: OPS.search_absmax_nf4(w, torch.ones(64), 64), W),
    "encode_nf4": (lambda w: OPS.encode_nf4(w, torch.ones(w.numel() // 64), 64), W),
    "encode_nf4_stochastic": (lambda w: OPS.encode_nf4_stochastic(w, torch.ones(w.numel() // 64), 64, 0), W),
    "merge_lora_nf4": (lambda a: OPS.merge_lora_nf4(*PACKED, a, torch.ones(48, 4), 1.0, 0), torch.randn(4, 64)),
    "grouped_linear_nf4": (lambda x: OPS.grouped_linear_nf4(x, OFFSETS, *STACK, 48, None, A2, B2, 1.0), S.x),
    "grouped_linear_nf4: bias": (
        lambda t: OPS.grouped_linear_nf4(S.x, OFFSETS, *STACK, 48, t, A2, B2, 1.0),
        torch.randn(2, 48),
    ),
    "grouped_linear_nf4: lora_a": (lambda t: OPS.grouped_linear_nf4(S.x, OFFSETS, *STACK, 48, None, t, B2, 1.0), A2),
    "grouped_linear_nf4: lora_b": (lambda t: OPS.grouped_linear_nf4(S.x, OFFSETS, *STACK, 48, None, A2, t, 1.0), B2),
    "linear_nf4: lora_b": (lambda b: OPS.linear_nf4(S.x, *PACKED, 48, None, LORA[0], b, *LORA[2:]), S.lora_b),
    "grouped_linear_nf4_dx": (lambda dy: OPS.grouped_linear_nf4_dx(dy, OFFSETS, *STACK, 64, A2, B2, 1.0), DY),
    "grouped_linear_nf4_dlora": (lambda x: OPS.grouped_linear_nf4_dlora(DY, x, OFFSETS, A2, B2, 1.0), S.x),
}


@ways
@pytest.mark.parametrize("call", REFUSING)
def test_no_operator_drops_a_tangent(call: str, way: str) -> None:
    f, x = REFUSING[call]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        tangent_of(f, x, way)
    f(x)


WITHOUT_A_GRADIENT = (
    "grouped_linear_nf4",
    "linear_dense",
    "grouped_linear_nf4: bias",
    "grouped_linear_nf4: lora_a",
    "grouped_linear_nf4: lora_b",
    "linear_nf4: lora_a",
    "linear_nf4: lora_b",
    "encode_nf4",
    "encode_nf4_stochastic",
    "merge_lora_nf4",
)


@pytest.mark.parametrize("call", [name for name in REFUSING if name not in WITHOUT_A_GRADIENT])
def test_no_operator_drops_a_gradient(call: str) -> None:
    f, x = REFUSING[call]
    if call.startswith("linear_nf4:"):
        return  # frozen state, like any input for which a Function returns None
    outputs = f(x.detach().clone().requires_grad_())
    loss = sum(t.sum() for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.is_floating_point())
    with pytest.raises(RuntimeError, match=f"{call.partition(':')[0]} has no derivative"):
        loss.backward()


def test_the_refusals_are_of_all_operators() -> None:
    others = {name for name in OPERATORS if "_with_" in name or name == "dequantize_nf4"}
    assert {name.partition(":")[0] for name in REFUSING} == set(OPERATORS) - others


@pytest.mark.parametrize("dims", [(0, None, None), (1, None, None), (None, 0, None), (0, 0, 0)], ids=str)
def test_vmap_is_the_layer_sample_by_sample(dims: tuple[int | None, ...]) -> None:
    args = [
        t if d is None else torch.randn(3, *t.shape).movedim(0, d) for t, d in zip((S.x, *LORA[:2]), dims, strict=True)
    ]
    close(torch.func.vmap(layer, in_dims=dims)(*args), torch.func.vmap(dense, in_dims=dims)(*args))


@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None)], ids=str)
def test_vmap_and_gradients_per_sample(dims: tuple[int | None, ...]) -> None:
    args = [t if d is None else torch.randn(3, *t.shape) for t, d in zip((S.x, *LORA[:2]), dims, strict=True)]
    found, expected = (
        torch.func.vmap(torch.func.grad(lambda *a, f=f: f(*a).square().sum(), argnums=(0, 1, 2)), in_dims=dims)(*args)
        for f in (layer, dense)
    )
    close(found, expected)
    close(*(torch.func.jacrev(f)(S.x) for f in (layer, dense)))
    close(*(torch.func.jacfwd(f)(S.x) for f in (layer, dense)))


def test_vmap_has_the_dropout_of_each_sample() -> None:
    xs = torch.randn(3, 5, 64)

    def dropping(x: Tensor, seed: int | None = 7) -> Tensor:
        return qlora_ext.linear_nf4(x, S.w4, None, S.lora_a, S.lora_b, 1.0, 0.5, seed)

    close(torch.func.vmap(dropping)(xs), torch.stack([dropping(x) for x in xs]))
    one = S.x.expand(2, 5, 64)
    same = torch.func.vmap(lambda x: dropping(x, None), randomness="same")(one)
    different = torch.func.vmap(lambda x: dropping(x, None), randomness="different")(one)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: dropping(x, None))(one)


@pytest.mark.parametrize("width", [64, 48])  # full blocks, and rows that begin within a block
def test_vmap_of_modules(width: int) -> None:
    table = Embedding4bit.from_embedding(nn.Embedding(10, width))
    ids = torch.randint(0, 10, (3, 4))
    assert torch.equal(torch.func.vmap(table)(ids), table(ids))
    with pytest.raises((IndexError, RuntimeError), match="index"):
        torch.func.vmap(table)(ids + 7)
    experts = Experts4bit.from_experts(Experts())
    index, weights = routing()
    x = torch.randn(3, 11, 64)
    close(
        torch.func.vmap(lambda x: experts(x, index, weights))(x), torch.stack([experts(s, index, weights) for s in x])
    )


def test_vmap_of_every_other_operator() -> None:
    """The expected result is that of the operator for each sample."""
    for f, x in REFUSING.values():
        xs = torch.stack([x, 2 * x, x / 2])
        found, expected = torch.func.vmap(f)(xs), [f(x) for x in xs]
        for i, parts in enumerate(expected):
            parts, of = (parts, found) if isinstance(parts, tuple) else ((parts,), (found,))
            assert all(torch.equal(t[i], part) for t, part in zip(of, parts, strict=True))


SECOND = {
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(S.x),
    "jvp of grad": lambda f: torch.func.jvp(torch.func.grad(f), (S.x,), (S.x,)),
    "grad of jvp": lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (S.x,))[1])(S.x),
    "hessian": lambda f: torch.func.hessian(f)(S.x),
    "backward of grad": lambda f: torch.func.grad(f)(S.x.clone().requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("which", SECOND)
def test_second_derivatives_are_refused(which: str) -> None:
    with pytest.raises(NotImplementedError, match="torch.func.grad: 4-bit layers have first derivatives only"):
        SECOND[which](lambda x: layer(x).square().sum())
