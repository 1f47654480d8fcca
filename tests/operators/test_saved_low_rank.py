"""The low-rank products that training saves instead of computing them twice: h = scaling · dropout(x) · lora_aᵀ of the
forward, for the backward, and g = scaling · dy · lora_b of dX, for the gradients of the adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accuracy import assert_accurate
from grouped_samples import KINDS, GroupedSample
from samples import DEVICES, DTYPES, linear_sample

OPS = torch.ops.qlora
every_device = pytest.mark.parametrize("device", DEVICES)
# CUDA splits the sums over more than 1024 tokens.
PROBLEMS = [*(("linear", m) for m in (1, 16, 33, 1300, (2, 70))), ("experts", 211)]


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize(("kind", "m"), PROBLEMS)
@pytest.mark.parametrize(("n", "k"), [(48, 128), (31, 37)])
def test_saved_products_are_correct_and_do_not_change_results(
    n: int, k: int, kind: str, m, rank: int, dtype: torch.dtype, device: str
) -> None:
    s = KINDS[kind](m, n, k, rank, dtype, device, dropout_p=0.3)
    dy, is_grouped = s.dy(), isinstance(s, GroupedSample)
    own = slice(None, s.unassigned().start) if is_grouped else slice(None)
    (y, h), (dx, g) = s.forward(with_h=True), s.dx(dy, with_g=True)
    assert (h.shape, g.shape) == ((*s.x.shape[:-1], rank), (*s.x.shape[:-1], rank))
    assert h.dtype == g.dtype == dtype
    for found, expected in ((h, s.h_accuracy()), (g, s.g_accuracy(dy)), (y, s.forward_accuracy())):
        assert_accurate(found[own], expected)
    if is_grouped:
        assert not any(t[s.unassigned()].any() for t in (y, h, dx, g))
    assert torch.equal(dx, s.dx(dy))
    tokens = y[..., 0].numel()
    if device == "cpu" or is_grouped or tokens > 16:  # for up to 16 tokens, CUDA rounds h only if it saves it
        assert torch.equal(y, s.forward())
    alone = s.dlora(dy)
    for kept in ({"h": h}, {"g": g}, {"h": h, "g": g}):
        with_kept = s.dlora(dy, **kept)
        s.check_dlora(with_kept, dy)
        # CPU kernels for few tokens sum h and g in another order.
        if device == "cuda" or (not is_grouped and tokens > 64):
            assert all(map(torch.equal, with_kept, alone))


@every_device
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(0, 48, 64, 2), (3, 0, 64, 2), (3, 48, 0, 2), (3, 48, 64, 0)])
def test_empty_products_are_zero(m: int, n: int, k: int, rank: int, device: str) -> None:
    s = linear_sample(m, n, k, rank, device=device)
    y, h = s.forward(with_h=True)
    _, g = s.dx(y, with_g=True)
    da, db = s.dlora(y, h=h, g=g)
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


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (("x", "lora_a", "lora_b"), [("with_h",), ("dx_with_g",), ("dlora", "h", "g")]),
        (("lora_b",), [("with_h",), ("dlora", "h")]),
        (("x",), [("",), ("dx",)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_twice(kind: str, trained: tuple[str, ...], expected: list[tuple[str, ...]]) -> None:
    s = KINDS[kind](70)
    for name in trained:
        getattr(s, name).requires_grad_()
    with Calls() as mode:
        s.forward().sum().backward()
    operator = "linear_nf4" if kind == "linear" else "grouped_linear_nf4"
    assert mode.calls == [(f"{operator}_{name}".rstrip("_"), *given) for name, *given in expected]
