"""Several adapters in one call: every row has the bits of the same call with its adapter alone."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

import qlora_ext
from adapter_samples import batch, dx_args, forward_args
from graphs import CountingBackend
from qlora_ext.adapters import stack_adapters
from samples import DTYPES, OPCHECKS

linear = torch.ops.qlora.linear_nf4


@pytest.mark.parametrize("of_row", [[2] * 7, [-1] * 7, [1] * 7, []])
def test_one_adapter_for_all_rows(of_row: list[int]) -> None:
    b = batch(len(of_row))
    b.of_row = torch.tensor(of_row, dtype=torch.int32)
    y = b.together()
    assert y.shape == (len(of_row), 48)
    assert not of_row or torch.equal(y, b.alone(of_row[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [6, 50])
def test_values_that_are_not_finite_stay_in_their_rows(m: int, dtype: torch.dtype) -> None:
    """Rows of other adapters, and rows without one, are as if the bad values did not exist."""
    b = batch(m, k=128, dtype=dtype)
    b.of_row = torch.tensor([2, 0, -1, 3, 1, 0], dtype=torch.int32).repeat(m)[:m]
    clean = b.together()
    dy = torch.randn(m, 48).to(dtype)
    clean_dx = torch.ops.qlora.linear_nf4_dx(*dx_args(b, dy, None))
    b.lora_a[2][1, 5], b.lora_a[2][0, 9] = torch.inf, torch.nan
    b.lora_b[2][7, 3] = -torch.inf
    others = b.of_row != 2
    assert torch.equal(b.together()[others], clean[others])
    assert not b.together()[~others].isfinite().all()
    dx = torch.ops.qlora.linear_nf4_dx(*dx_args(b, dy, None))
    assert torch.equal(dx[others], clean_dx[others])
    b = dataclasses.replace(batch(m, k=128, dtype=dtype), of_row=b.of_row)
    b.x[0, 3], dy[0, 3] = torch.nan, torch.inf
    y, clean = b.together(), b.of_alone()
    assert y[0].isnan().all()
    assert torch.equal(y[1:], clean[1:])
    assert torch.equal(torch.ops.qlora.linear_nf4_dx(*dx_args(b, dy, None))[1:], clean_dx[1:])


@pytest.mark.parametrize("order", ["random", "sorted"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [12, 40])
def test_gradients_are_those_of_the_adapters_own_rows(m: int, dtype: torch.dtype, dropout_p: float, order: str) -> None:
    b = batch(m, k=128, dtype=dtype, order=order, dropout_p=dropout_p, requires_grad=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    y = b.together()
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(b.x.grad, b.of_alone(lambda e: torch.ops.qlora.linear_nf4_dx(*dx_args(b, dy, e))))
    for e, (a, lora_b) in enumerate(zip(b.lora_a, b.lora_b, strict=True)):
        rows = (b.of_row == e).nonzero().flatten()
        args = [t.detach() for t in (dy[rows], b.x[rows], a, lora_b)]
        if dropout_p == 0.0:
            expected = torch.ops.qlora.linear_nf4_dlora(*args, b.scaling[e], 0.0, 7)
            equal = torch.equal
        else:  # the rows of others give zeros: the same sums, in another order
            dy_of_e = torch.where((b.of_row == e)[:, None], dy, 0)
            args = [t.detach() for t in (dy_of_e, b.x, a, lora_b)]
            expected = torch.ops.qlora.linear_nf4_dlora(*args, b.scaling[e], dropout_p, 7)
            equal = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance)
        assert all(equal(got, want) for got, want in zip((a.grad, lora_b.grad), expected, strict=True))


def test_dropout_of_consecutive_rows_and_of_scattered_rows_agree() -> None:
    """Consecutive rows are read in place, others are copied and masked first."""
    b = batch(12, k=96, dropout_p=0.5)
    s = stack_adapters(b.lora_a[:1], b.lora_b[:1], b.scaling[:1])
    dy = torch.randn(12, 48)

    def dlora(rows: list[int]) -> tuple[Tensor, Tensor]:
        of_row = torch.full((12,), -1, dtype=torch.int32)
        of_row[rows] = 0
        only = dy.clone()
        only[8] = 0  # the row that the second call has in between
        lora = s.lora_a, s.lora_b, 1.0, 0.5, 7, None, None, None
        last = of_row, s.rank_offsets, s.scalings, None, s.max_rank
        return torch.ops.qlora.linear_nf4_dlora(only, b.x, *lora, *last)

    for consecutive, scattered in zip(dlora([6, 7, 8, 9]), dlora([6, 7, 9]), strict=True):
        assert torch.allclose(consecutive, scattered, 1e-6, 1e-6)


def test_the_seed_of_the_call_serves_all() -> None:
    b = batch(dropout_p=0.5)
    seeded = dataclasses.replace(b, seeds=[7] * 4)
    assert torch.equal(b.together(), seeded.together())
    drawn = qlora_ext.linear_nf4(b.x, b.w4, None, b.lora_a, b.lora_b, b.scaling, 0.5, adapter_of_row=b.of_row)
    assert drawn.isfinite().all()
    tensor = torch.tensor(7)
    by_tensor = qlora_ext.linear_nf4(b.x, b.w4, b.bias, b.lora_a, b.lora_b, b.scaling, 0.5, tensor, b.of_row)
    assert torch.equal(by_tensor, b.together())


def test_adapters_of_sequences_and_stacks() -> None:
    b = batch(12)
    expected = b.together()
    x, of_row = b.x.view(3, 4, 64), b.of_row.view(3, 4)
    s = b.stacked()

    def call(of_row: Tensor) -> Tensor:
        return qlora_ext.linear_nf4(x, b.w4, b.bias, s, adapter_of_row=of_row)

    assert torch.equal(call(of_row).view(12, -1), expected)
    assert torch.equal(call(of_row.long().flatten()).view(12, -1), expected)
    by_sequence = call(torch.tensor([2, -1, 0]))
    assert torch.equal(by_sequence[1], qlora_ext.linear_nf4(x, b.w4, b.bias)[1])
    assert torch.equal(by_sequence, call(torch.tensor([[2] * 4, [-1] * 4, [0] * 4])))


def test_autocast() -> None:
    b = batch(requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = b.together()
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (b.x, *b.parameters))


def test_opcheck() -> None:
    b = batch(5, requires_grad=True, seeds=[1, 2, 3, 4], dropout_p=0.2)
    torch.library.opcheck(linear, tuple(t.detach() if isinstance(t, Tensor) else t for t in forward_args(b)))
    args = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in forward_args(b)]
    torch.library.opcheck(linear, tuple(args), test_utils=OPCHECKS)
    plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in forward_args(b))
    torch.library.opcheck(torch.ops.qlora.linear_nf4_with_h, plain)
    dy = torch.randn(5, 48)
    dx = tuple(t.detach() if isinstance(t, Tensor) else t for t in dx_args(b, dy, None))
    torch.library.opcheck(torch.ops.qlora.linear_nf4_dx_with_g, dx)


def test_fullgraph_compile() -> None:
    b = batch(6, requires_grad=True)
    backend = CountingBackend()
    compiled = torch.compile(
        lambda x, rows: dataclasses.replace(b, of_row=rows).together(x), backend=backend, fullgraph=True
    )
    y = compiled(b.x, b.of_row)
    assert torch.equal(y, b.together())
    y.sum().backward()
    got = [t.grad.clone() for t in (b.x, *b.parameters)]
    for t in (b.x, *b.parameters):
        t.grad = None
    b.together().sum().backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(got, (b.x, *b.parameters), strict=True))
    other = b.of_row.flip(0)
    assert torch.equal(compiled(b.x, other), dataclasses.replace(b, of_row=other).together())
    assert backend.forward == 1


def test_vmap() -> None:
    b = batch(5)
    xs = torch.randn(3, 5, 64)
    y = torch.func.vmap(b.together)(xs)
    assert torch.equal(y, torch.stack([b.together(x) for x in xs]))


def _wrong(**changes) -> dict:
    """Arguments of torch.ops.qlora.linear_nf4 by name, some of them wrong."""
    b = batch(5)
    names = [argument.name for argument in linear.default._schema.arguments]
    return {**dict(zip(names, forward_args(b), strict=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_of_row": torch.tensor([0, 1, 4, 0, 0], dtype=torch.int32)}, "adapter_of_row: .* -1 .* 3, got 4"),
        ({"adapter_of_row": torch.tensor([0, 1, -2, 0, 0], dtype=torch.int32)}, "adapter_of_row: .* got -2 for row 2"),
        ({"adapter_of_row": torch.zeros(4, dtype=torch.int32)}, r"adapter_of_row: expected shape \[5\]"),
        ({"adapter_of_row": torch.zeros(5)}, "adapter_of_row: expected Int"),
        ({"adapter_of_row": None}, "rank_offsets: expected None"),
        ({"rank_offsets": None}, "rank_offsets: expected a tensor"),
        ({"rank_offsets": torch.tensor([0, 4, 4, 12, 14], dtype=torch.int32)}, "rank_offsets: expected 15 last"),
        ({"rank_offsets": torch.tensor([0, 4, 3, 12, 15], dtype=torch.int32)}, "rank_offsets: expected ascending"),
        ({"rank_offsets": torch.tensor([1, 4, 4, 12, 15], dtype=torch.int32)}, "rank_offsets: expected 0 first"),
        ({"rank_offsets": torch.tensor([0, 4, 4, 12, 15])}, "rank_offsets: expected Int"),
        ({"rank_offsets": torch.zeros(0, dtype=torch.int32)}, "rank_offsets: expected shape"),
        ({"scalings": None}, "scalings: expected a tensor"),
        ({"scalings": torch.ones(3)}, r"scalings: expected shape \[4\]"),
        ({"scalings": torch.full((4,), torch.inf)}, "scalings: expected finite"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds: expected shape \[4\]"),
        ({"seeds": torch.zeros(4, dtype=torch.int64), "seed_tensor": torch.tensor(3)}, "seed_tensor: expected None"),
        ({"max_rank": 7}, "max_rank: expected 8"),
        ({"max_rank": 9}, "max_rank: expected 8"),
        ({"scaling": 2.0}, "scaling: expected 1.0"),
        ({"lora_a": None, "lora_b": None}, "lora_a: expected a tensor"),
    ],
)
def test_errors_of_the_operator_name_the_argument(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**_wrong(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_b": []}, ValueError, "lora_b: expected a list of 4"),
        ({"scaling": [1.0]}, ValueError, "scaling: expected a list of 4"),
        ({"seed": [1, 2]}, ValueError, "seed: expected a list of 4"),
        ({"lora_a": []}, ValueError, "lora_a: expected a list of at least one"),
        ({"lora_a": torch.zeros(4, 64)}, TypeError, "lora_a: expected a list"),
        ({"adapter_of_row": None}, TypeError, "adapter_of_row: expected a tensor"),
        ({"adapter_of_row": torch.zeros(5)}, ValueError, "adapter_of_row: expected int32"),
        ({"adapter_of_row": torch.zeros(2, dtype=torch.int32)}, ValueError, "adapter_of_row: expected the leading"),
        ({"adapter_of_row": torch.full((5,), 2**32)}, ValueError, "adapter_of_row: .* got 2147483647"),
    ],
)
def test_errors_of_the_function_name_the_argument(changes: dict, error: type, message: str) -> None:
    b = batch(5)
    given = {"lora_a": b.lora_a, "lora_b": b.lora_b, "scaling": b.scaling, "adapter_of_row": b.of_row, **changes}
    with pytest.raises(error, match=message):
        qlora_ext.linear_nf4(b.x, b.w4, **given)


def test_matrices_that_do_not_fit_are_named() -> None:
    b = batch(5)
    for matrices, change, message in (
        (b.lora_a, torch.zeros(8, 63), r"lora_a\[2\]: expected 64 columns"),
        (b.lora_b, torch.zeros(47, 8), r"lora_b\[2\]: expected 48 rows"),
        (b.lora_b, torch.zeros(48, 7), r"lora_b\[2\]: expected 8 columns"),
        (b.lora_b, torch.zeros(48), r"lora_b\[2\]: expected two dimensions"),
        (b.lora_b, torch.zeros(48, 8).double(), r"lora_b\[2\]: expected the dtype"),
    ):
        right = matrices[2]
        matrices[2] = change
        with pytest.raises(ValueError, match=message):
            b.together()
        matrices[2] = right
