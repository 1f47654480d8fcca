"""The low-rank products that training saves instead of computing them twice: h = scaling · dropout(x) · lora_aᵀ of the
forward, for the backward, and g = scaling · dy · lora_b of dX, for the gradients of the adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from accuracy import Expected, assert_accurate, given, sums
from grouped_samples import GroupedSample, grouped_sample
from samples import DEVICES, DTYPES, LinearSample, linear_sample, rows, to_f64

OPS = torch.ops.qlora
every_device = pytest.mark.parametrize("device", DEVICES)


def expected_h(s: LinearSample) -> Expected:
    dropped = rows(s.x) * reference.dropout_mask(rows(s.x).shape, s.dropout_p, s.seed)
    return sums([(given(dropped), given(s.scaling * to_f64(s.lora_a).T), 1.0)], 0.0, s.x.dtype)


def expected_g(s: LinearSample, dy: Tensor) -> Expected:
    return sums([(given(rows(dy)), given(s.scaling * to_f64(s.lora_b)), 1.0)], 0.0, s.x.dtype)


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("m", [1, 16, 33, (2, 70)])
@pytest.mark.parametrize(("n", "k"), [(48, 128), (31, 37)])
def test_saved_products_are_correct_and_do_not_change_results(
    n, k, m, rank: int, dtype: torch.dtype, device: str
) -> None:
    s = linear_sample(m, n, k, rank, dtype, device, dropout_p=0.3)
    y, h = OPS.linear_nf4_with_h(*s.args)
    dy = torch.randn_like(y)
    dx, g = OPS.linear_nf4_dx_with_g(*s.dx_args(dy))
    assert (h.shape, g.shape) == ((*s.x.shape[:-1], rank), (*s.x.shape[:-1], rank))
    assert h.dtype == g.dtype == dtype
    assert_accurate(h, expected_h(s))
    assert_accurate(g, expected_g(s, dy))
    assert_accurate(y, s.forward_accuracy())
    assert torch.equal(dx, OPS.linear_nf4_dx(*s.dx_args(dy)))
    # For up to 16 tokens, CUDA rounds h only if it saves it.
    if device == "cpu" or y[..., 0].numel() > 16:
        assert torch.equal(y, OPS.linear_nf4(*s.args))


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("m", [3, 70, 1300])  # CUDA splits the sums over more than 1024 tokens
@pytest.mark.parametrize(("n", "k"), [(48, 128), (31, 37)])
def test_gradients_of_adapters_with_saved_products(n, k, m, rank: int, dtype: torch.dtype, device: str) -> None:
    """The same bits as without, except with CPU kernels for few tokens, which sum h and g in another order."""
    s = linear_sample(m, n, k, rank, dtype, device, dropout_p=0.3)
    y, h = OPS.linear_nf4_with_h(*s.args)
    dy = torch.randn_like(y)
    _, g = OPS.linear_nf4_dx_with_g(*s.dx_args(dy))
    alone = OPS.linear_nf4_dlora(dy, s.x, *s.lora_args)
    for kept in ({"h": h}, {"g": g}, {"h": h, "g": g}):
        with_kept = OPS.linear_nf4_dlora(dy, s.x, *s.lora_args, **kept)
        for got, expected in zip(with_kept, s.dlora_accuracy(dy), strict=True):
            assert_accurate(got, expected)
        if device == "cuda" or m > 64:
            assert all(map(torch.equal, with_kept, alone))


@every_device
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(0, 48, 64, 2), (3, 0, 64, 2), (3, 48, 0, 2), (3, 48, 64, 0)])
def test_empty_products_are_zero(m: int, n: int, k: int, rank: int, device: str) -> None:
    s = linear_sample(m, n, k, rank, device=device)
    y, h = OPS.linear_nf4_with_h(*s.args)
    _, g = OPS.linear_nf4_dx_with_g(*s.dx_args(y))
    da, db = OPS.linear_nf4_dlora(y, s.x, *s.lora_args, h=h, g=g)
    assert (h.shape, g.shape, da.shape, db.shape) == ((m, rank), (m, rank), (rank, k), (n, rank))
    if m == 0 or n == 0:
        assert not h.any()
    if m == 0 or k == 0:
        assert not g.any()


@every_device
@pytest.mark.parametrize("operator", ["linear_nf4_with_h", "linear_nf4_dx_with_g"])
def test_adapters_are_needed(operator: str, device: str) -> None:
    s = linear_sample(3, rank=None, device=device)
    args = s.args if operator == "linear_nf4_with_h" else s.dx_args(torch.ones(3, 48, device=device))
    for arguments in (args, [a.to("meta") if isinstance(a, Tensor) else a for a in args]):
        with pytest.raises(ValueError, match="lora_a: expected a tensor, got None"):
            getattr(OPS, operator)(*arguments)


class Calls(TorchDispatchMode):
    """The qlora operators that were called, and which of h and g they received."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qlora":
            names = [a.name for a in func._schema.arguments]
            named = dict(zip(names, args, strict=False)) | (kwargs or {})
            given = [name for name in ("h", "g") if named.get(name) is not None]
            self.calls.append((func._schema.name.removeprefix("qlora::"), *given))
        return func(*args, **(kwargs or {}))


TRAINED = [
    (("x", "lora_a", "lora_b"), [("linear_nf4_with_h",), ("linear_nf4_dx_with_g",), ("linear_nf4_dlora", "h", "g")]),
    (("lora_b",), [("linear_nf4_with_h",), ("linear_nf4_dlora", "h")]),
    (("x", "bias"), [("linear_nf4",), ("linear_nf4_dx",)]),
]


@pytest.mark.parametrize(("trained", "expected"), TRAINED, ids=str)
def test_nothing_is_computed_twice(trained: tuple[str, ...], expected: list[tuple[str, ...]]) -> None:
    s = linear_sample(70)
    for name in trained:
        getattr(s, name).requires_grad_()
    with Calls() as mode:
        OPS.linear_nf4(*s.args).sum().backward()
    assert mode.calls == expected


@pytest.mark.parametrize(("trained", "expected"), TRAINED, ids=str)
def test_nothing_is_computed_twice_for_experts(trained: tuple[str, ...], expected: list[tuple[str, ...]]) -> None:
    s = grouped_sample([7, 0, 70])
    for name in set(trained) - {"bias"}:  # its gradient is a separate call
        getattr(s, name).requires_grad_()
    with Calls() as mode:
        s.forward().sum().backward()
    assert mode.calls == [(f"grouped_{name}", *given) for name, *given in expected]


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize(("n", "k"), [(48, 128), (31, 37)])
def test_experts(n: int, k: int, rank: int, dtype: torch.dtype, device: str) -> None:
    s = grouped_sample([0, 80, 1, 0, 130], n, k, rank, dtype, device, dropout_p=0.3)
    dy = s.dy()
    y, h = OPS.grouped_linear_nf4_with_h(s.x, s.offsets, *s.args())
    dx, g = OPS.grouped_linear_nf4_dx_with_g(dy, s.offsets, *s.dx_args())
    assert torch.equal(y, s.forward())
    assert torch.equal(dx, s.dx(dy))
    for e, part in s.parts():
        assert_accurate(h[part], expected_h(s.of_expert(e, s.x)).rows(part))
        assert_accurate(g[part], expected_g(s.of_expert(e, s.x), dy).rows(part))
    assert not h[s.unassigned()].any()
    assert not g[s.unassigned()].any()
    check_dlora(s, dy, h, g, same_bits=device == "cuda")


def check_dlora(s: GroupedSample, dy: Tensor, h: Tensor, g: Tensor, same_bits: bool) -> None:
    da, db = OPS.grouped_linear_nf4_dlora(dy, s.x, s.offsets, *s.lora_args, h=h, g=g)
    if same_bits:
        assert all(map(torch.equal, (da, db), s.dlora(dy)))
    for e, (expected_a, expected_b) in s.dlora_accuracy(dy).items():
        assert_accurate(da[e], expected_a)
        assert_accurate(db[e], expected_b)
