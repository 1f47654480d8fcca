"""Several adapters in one call, over one weight or over experts: each row has the bits of the call with its adapter."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_ext
from adapter_samples import RANKS, Batch, batch, expert_batch
from forms import FORMS
from graphs import CountingBackend
from grouped_samples import OPS, SKEWED
from qlora_ext.adapters import stack_adapters
from samples import DTYPES, OPCHECKS

either = pytest.mark.parametrize("make", [batch, expert_batch])
NAMES = ["", "_with_h", "_dx", "_dx_with_g", "_dlora"]


@either
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_each_row_has_the_bits_of_its_adapter_alone(make: Callable, dropout_p: float, dtype: torch.dtype) -> None:
    for rows, order, seeds in ((12, "random", None), (40, "sorted", [5, -6, 7, 8])):
        make(rows, k=128, dtype=dtype, order=order, dropout_p=dropout_p, seeds=seeds).check()
    if make is expert_batch:
        make(SKEWED[8], dtype=dtype, dropout_p=dropout_p).check()


def test_random_problems() -> None:
    draw = random.Random(5)
    for _ in range(25):
        counts = [draw.choice([0, 0, 1, 2, 7, 40]) for _ in range(draw.randint(1, 6))]
        ranks = tuple(draw.choice([0, 1, 2, 5, 16, 33]) for _ in range(draw.randint(1, 5)))
        options = {"n": draw.choice([1, 24, 39, 80]), "k": draw.choice([32, 64, 101, 192])}
        options |= {"dtype": draw.choice(DTYPES), "dropout_p": draw.choice([0.0, 0.0, 0.3, 1.0])}
        options |= {"bias": draw.random() < 0.5, "unassigned": draw.choice([0, 2])}
        if options["k"] % 32 == 0 and draw.random() < 0.5:
            options["form"] = dataclasses.replace(draw.choice(list(FORMS.values())), block_size=32)
        order = draw.choice(["random", "sorted"])
        expert_batch(counts, ranks=ranks, order=order, **options).check()


@either
@pytest.mark.parametrize("of_row", [-1, 1, 2])  # none, an adapter of rank 0, and another one
@pytest.mark.parametrize("rows", [7, 0])
def test_one_adapter_for_all_rows(make: Callable, rows: int, of_row: int) -> None:
    b = make(rows)
    b.of_row.fill_(of_row)
    b.check()
    da, db = b.run("_dlora", dy=b.dy())
    assert (da.shape[-2:], db.shape[-2:]) == ((15, 64), (48, 15))
    assert of_row == 2 or not (da.any() or db.any())


@either
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [6, 50])
def test_values_that_are_not_finite_stay_in_their_rows(make: Callable, rows: int, dtype: torch.dtype) -> None:
    """Rows of other adapters, and rows without one, are as if the bad values did not exist."""

    def outputs(b: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return b.run(""), b.run("_dx", dy=dy), *b.run("_dlora", dy=dy)

    of_row = torch.tensor([2, 0, -1, 3, 1, 0], dtype=torch.int32).repeat(rows)[:rows]
    clean, bad = (dataclasses.replace(make(rows, k=128, dtype=dtype), of_row=of_row) for _ in range(2))
    dy = bad.dy()
    expected = outputs(clean, dy)
    bad.lora_a[2][..., 1, 5], bad.lora_a[2][..., 0, 9], bad.lora_b[2][..., 7, 3] = torch.inf, torch.nan, -torch.inf
    y, dx, da, db = outputs(bad, dy)
    others, ranks = of_row != 2, [*range(4), *range(12, 15)]  # of the others
    assert not y[~others].isfinite().all()
    assert torch.equal(y[others], expected[0][others])
    assert torch.equal(dx[others], expected[1][others])
    assert torch.equal(da[..., ranks, :], expected[2][..., ranks, :])
    assert torch.equal(db[..., ranks], expected[3][..., ranks])
    clean.x[0, 3], dy[0, 3] = torch.nan, torch.inf
    y, dx, *_ = outputs(clean, dy)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], expected[0][1:])
    assert torch.equal(dx[1:], expected[1][1:])


@either
def test_gradients(make: Callable) -> None:
    b = make(20, dropout_p=0.2, seeds=[3, 4, 5, 6])
    y, dy = b.run(""), b.dy()
    leaves = [t.requires_grad_() for t in (b.x, b.bias, *b.parameters)]
    dx, dbias, *lora = torch.autograd.grad(b.run(""), leaves, dy)
    with torch.no_grad():
        (found, h), (expected_dx, g) = b.run("_with_h"), b.run("_dx_with_g", dy=dy)
        da, db = b.run("_dlora", dy=dy, h=h, g=g)
    assert torch.equal(found, y)
    assert torch.equal(dx, expected_dx)
    assert torch.equal(torch.cat(lora[:4], -2), da)
    assert torch.equal(torch.cat(lora[4:], -1), db)
    if make is expert_batch:
        torch.testing.assert_close(dbias, torch.stack([t.sum(0) for t in dy[: b.unassigned.start].split(b.g.counts)]))
    else:
        torch.testing.assert_close(dbias, dy.sum(0))


@either
def test_gradcheck(make: Callable) -> None:
    b = make(6, n=6, k=10, ranks=(2, 0, 3), dtype=torch.float64, block_size=32, dropout_p=0.4)
    leaves = [t.requires_grad_() for t in (b.x, b.bias, *b.parameters)]
    assert torch.autograd.gradcheck(lambda *_: b.run(""), leaves)


def test_dropout_of_consecutive_rows_and_of_scattered_rows_agree() -> None:
    """Consecutive rows are read in place, others are copied and masked first."""
    b = batch(12, k=96, dropout_p=0.5)
    dy = torch.randn(12, 48)
    dy[8] = 0  # the row that the second call has in between

    def dlora(rows: list[int]) -> tuple[Tensor, Tensor]:
        of_row = torch.full((12,), -1, dtype=torch.int32)
        of_row[rows] = 0
        return dataclasses.replace(b, of_row=of_row).run("_dlora", dy=dy)

    torch.testing.assert_close(dlora([6, 7, 8, 9]), dlora([6, 7, 9]), rtol=1e-6, atol=1e-6)


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


@either
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(make: Callable, name: str) -> None:
    b = make(5, seeds=[1, 2, 3, 4], dropout_p=0.2)
    arguments = b.arguments(name, dy=b.dy())
    if name == "_dlora":
        arguments |= {"h": b.run("_with_h")[1], "g": b.run("_dx_with_g", dy=b.dy())[1]}
    if name == "":
        arguments |= {key: arguments[key].clone().requires_grad_() for key in ("x", "lora_a", "lora_b")}
    operator = getattr(OPS, b.operator + name).default
    torch.library.opcheck(operator, (), arguments, test_utils=OPCHECKS)


def test_fullgraph_compile() -> None:
    b = batch(6, requires_grad=True)
    backend = CountingBackend()
    compiled = torch.compile(
        lambda x, rows: dataclasses.replace(b, of_row=rows).together(x), backend=backend, fullgraph=True
    )
    leaves = [b.x, *b.parameters]
    y, expected = compiled(b.x, b.of_row), b.together()
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y.sum(), leaves)
    assert all(map(torch.equal, found, torch.autograd.grad(expected.sum(), leaves)))
    other = b.of_row.flip(0)
    assert torch.equal(compiled(b.x, other), dataclasses.replace(b, of_row=other).together())
    assert backend.forward == 1


@either
def test_vmap(make: Callable) -> None:
    b = make(5, dropout_p=0.3)
    xs = torch.randn(3, *b.x.shape)

    def call(x: Tensor) -> Tensor:
        changed = {"x": x} if isinstance(b, Batch) else {"g": dataclasses.replace(b.g, x=x)}
        return dataclasses.replace(b, **changed).run("")

    assert torch.equal(torch.func.vmap(call)(xs), torch.stack([call(x) for x in xs]))


@pytest.mark.parametrize("counts", [[40, 2, 1, 3, 0, 5, 2, 2], [1] * 9, [20, 30]], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(counts: list[int]) -> None:
    m, threads = expert_batch(counts, dropout_p=0.3), torch.get_num_threads()
    dy, results = m.dy(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append((*m.run("_with_h"), *m.run("_dx_with_g", dy=dy), *m.run("_dlora", dy=dy)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@either
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_of_row": int32(0, 1, 4, 0, 0)}, "adapter_of_row: .* -1 .* 3, got 4"),
        ({"adapter_of_row": int32(0, 1, -2, 0, 0)}, "adapter_of_row: .* got -2 for row 2"),
        ({"adapter_of_row": int32(0, 0, 0, 0)}, r"adapter_of_row: expected shape \[5\]"),
        ({"adapter_of_row": torch.zeros(5)}, "adapter_of_row: expected Int"),
        ({"adapter_of_row": None}, "rank_offsets: expected None without adapter_of_row"),
        ({"rank_offsets": None}, "rank_offsets: expected a tensor"),
        ({"rank_offsets": int32(0, 4, 4, 12, 14)}, "rank_offsets: expected 15 last"),
        ({"rank_offsets": int32(0, 4, 3, 12, 15)}, "rank_offsets: expected ascending"),
        ({"rank_offsets": int32(1, 4, 4, 12, 15)}, "rank_offsets: expected 0 first"),
        ({"rank_offsets": torch.tensor([0, 4, 4, 12, 15])}, "rank_offsets: expected Int"),
        ({"rank_offsets": int32()}, "rank_offsets: expected shape"),
        ({"scalings": None}, "scalings: expected a tensor"),
        ({"scalings": torch.ones(3)}, r"scalings: expected shape \[4\]"),
        ({"scalings": torch.full((4,), torch.inf)}, "scalings: expected finite"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds: expected shape \[4\]"),
        ({"seeds": torch.zeros(4, dtype=torch.int64), "seed_tensor": torch.tensor(3)}, "seed_tensor: expected None"),
        ({"max_rank": 7}, "max_rank: expected 8"),
        ({"max_rank": 9}, "max_rank: expected 8"),
        ({"scaling": 2.0}, "scaling: expected 1.0"),
        ({"lora_a": None, "lora_b": None}, "lora_a: expected a tensor"),
        ({"lora_a": torch.zeros(15, 63)}, r"lora_a: expected shape \[(3, )?any, 64\]"),
    ],
)
def test_errors_of_the_operator_name_the_argument(make: Callable, changes: dict[str, Any], message: str) -> None:
    b = make(5)
    with pytest.raises(ValueError, match=message):
        getattr(OPS, b.operator)(**{**b.arguments(""), **changes})


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
        ({"adapter_of_row": int32(0, 0)}, ValueError, "adapter_of_row: expected the leading"),
        ({"adapter_of_row": torch.full((5,), 2**32)}, ValueError, "adapter_of_row: .* got 2147483647"),
    ],
)
def test_errors_of_the_function_name_the_argument(changes: dict, error: type, message: str) -> None:
    b = batch(5)
    given = {"lora_a": b.lora_a, "lora_b": b.lora_b, "scaling": b.scaling, "adapter_of_row": b.of_row, **changes}
    with pytest.raises(error, match=message):
        qlora_ext.linear_nf4(b.x, b.w4, **given)


@either
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_a", (8, 63), "expected 64 columns"),
        ("lora_b", (47, 8), "expected 48 rows"),
        ("lora_b", (48, 7), r"expected 8 columns \(the rank of lora_a\[2\]\)"),
        ("lora_b", (48,), "expected (two|three) dimensions"),
    ],
)
def test_matrices_that_do_not_fit_are_named(make: Callable, name: str, shape: tuple[int, ...], message: str) -> None:
    b = make(5)
    lead = b.lora_a[0].shape[:-2]
    assert stack_adapters(b.lora_a, b.lora_b).lora_b.shape == (*lead, 48, sum(RANKS))
    changed = getattr(b, name)
    for matrix, expected in (
        (torch.zeros(*lead, *shape), message),
        (torch.zeros(*changed[2].shape).double(), "expected the dtype"),
        (torch.zeros(2, *changed[2].shape[-2:]), "expected (two dimensions|three dimensions, the first of size .3.)"),
    ):
        matrices = {"lora_a": [*b.lora_a], "lora_b": [*b.lora_b]}
        matrices[name][2] = matrix
        with pytest.raises(ValueError, match=rf"{name}\[2\]: {expected}"):
            stack_adapters(**matrices)
