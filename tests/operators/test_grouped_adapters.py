"""Several adapters in one call of the operators over experts: a row has the bits of the call with its adapter alone."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from adapter_samples import RANKS, Adapters
from forms import FORMS
from grouped_samples import OPS, SKEWED, GroupedSample, grouped_sample
from qlora_ext.adapters import stack_adapters
from qlora_ext.weight import operands
from samples import DTYPES, OPCHECKS

# The arguments of every operator that describe a weight.
WEIGHT = [a.name for a in OPS.dequantize_nf4.default._schema.arguments if a.name not in ("shape", "dtype")]


@dataclasses.dataclass(kw_only=True)
class Mixed(Adapters):
    """Experts, adapters [E, R, K] and [E, N, R], and the adapter of each row."""

    g: GroupedSample

    def lora(self, adapter: int | None) -> dict[str, Any]:
        """The arguments for one adapter, for none (-1) or for all (None)."""
        if adapter is None:
            s = self.stacked()
            several = {"adapter_of_row": self.of_row, "rank_offsets": s.rank_offsets, "scalings": s.scalings}
            several |= {"seeds": s.seeds, "max_rank": s.max_rank, "seed": 0 if self.seeds else 7}
            return {"lora_a": s.lora_a, "lora_b": s.lora_b, "scaling": 1.0, "dropout_p": self.dropout_p, **several}
        if adapter < 0:
            return {"lora_a": None, "lora_b": None, "scaling": 1.0}
        numbers = {"scaling": self.scaling[adapter], "dropout_p": self.dropout_p}
        lora = {"lora_a": self.lora_a[adapter], "lora_b": self.lora_b[adapter], **numbers}
        return {**lora, "seed": self.seed_of(adapter)}

    @property
    def weight(self) -> dict[str, Any]:
        g = self.g
        return dict(zip(WEIGHT, operands(g.stack, g.weights[0]), strict=True)) | {"offsets": g.offsets}

    def forward(self, adapter: int | None = None, with_h: bool = False) -> Any:
        operator = OPS.grouped_linear_nf4_with_h if with_h else OPS.grouped_linear_nf4
        return operator(x=self.g.x, **self.weight, out_features=self.g.n, bias=self.g.bias, **self.lora(adapter))

    def dx(self, dy: Tensor, adapter: int | None = None, with_g: bool = False) -> Any:
        operator = OPS.grouped_linear_nf4_dx_with_g if with_g else OPS.grouped_linear_nf4_dx
        return operator(dy=dy, **self.weight, in_features=self.g.k, **self.lora(adapter))

    def dlora(self, dy: Tensor, adapter: int | None = None, **low_rank: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.grouped_linear_nf4_dlora(dy=dy, x=self.g.x, offsets=self.g.offsets, **self.lora(adapter), **low_rank)

    def only(self, adapter: int) -> Mixed:
        """The problem of the rows of an adapter."""
        own = self.of_row == adapter
        rows = own[: self.g.unassigned().start].split(list(self.g.counts))
        g = dataclasses.replace(self.g, x=self.g.x[own], counts=[int(r.sum()) for r in rows])
        return dataclasses.replace(self, g=g, of_row=self.of_row[own])

    def check(self) -> None:
        """All outputs against those of calls with one adapter."""
        dy = self.g.dy()
        (y, h), (dx, g) = self.forward(with_h=True), self.dx(dy, with_g=True)
        assert torch.equal(y, self.forward())
        assert torch.equal(dx, self.dx(dy))
        gradients, given = self.dlora(dy), self.dlora(dy, h=h, g=g)
        first = 0
        for e in range(-1, len(self.lora_a)):
            own = self.of_row == e
            assert torch.equal(y[own], self.forward(e)[own])
            assert torch.equal(dx[own], self.dx(dy, e)[own])
            rank = self.lora_a[e].shape[1] if e >= 0 else 0
            assert not h[own, rank:].any()
            assert not g[own, rank:].any()
            if e < 0:
                continue
            assert torch.equal(h[own, :rank], self.forward(e, with_h=True)[1][own])
            assert torch.equal(g[own, :rank], self.dx(dy, e, with_g=True)[1][own])
            ranks = slice(first, first + rank)
            first += rank
            of_own = {"h": h[own, :rank], "g": g[own, :rank]}
            for (da, db), low_rank in ((gradients, {}), (given, of_own)):
                got = da[:, ranks], db[..., ranks]
                if self.dropout_p == 0.0:
                    assert all(map(torch.equal, got, self.only(e).dlora(dy[own], e, **low_rank)))
                    continue
                # The mask depends on the index of a row: the same sums, in another order.
                expected = self.dlora(torch.where(own[:, None], dy, 0), e)
                tolerance = {torch.float32: 1e-5, torch.float64: 1e-6}.get(dy.dtype, 2e-2)
                assert all(torch.allclose(t, u, tolerance, tolerance) for t, u in zip(got, expected, strict=True))
        unassigned = self.g.unassigned()
        assert not any(t[unassigned].any() for t in (y, h, dx, g))


def mixed(counts: list[int], ranks: tuple[int, ...] = RANKS, order: str = "random", **options: Any) -> Mixed:
    more = {name: options.pop(name) for name in ("dropout_p", "seeds") if name in options}
    g = grouped_sample(counts, rank=None, **options)
    generator = torch.Generator().manual_seed(len(g.x) * g.n + g.k)

    def randn(*shape: int, factor: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * factor).to(g.x)

    of_row = torch.randint(-1, len(ranks), (len(g.x),), generator=generator)
    return Mixed(
        g=g,
        lora_a=[randn(len(counts), rank, g.k, factor=g.k**-0.5) for rank in ranks],
        lora_b=[randn(len(counts), g.n, rank, factor=0.2) for rank in ranks],
        scaling=[0.3 + 0.7 * e for e in range(len(ranks))],
        of_row=(of_row.sort()[0] if order == "sorted" else of_row).int().to(g.x.device),
        **more,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_each_row_has_the_bits_of_its_adapter_alone(dropout_p: float, dtype: torch.dtype) -> None:
    for order, seeds in (("random", None), ("sorted", [5, -6, 7, 8])):
        mixed(SKEWED[8], dtype=dtype, order=order, dropout_p=dropout_p, seeds=seeds).check()


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
        mixed(counts, ranks, draw.choice(["random", "sorted"]), **options).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_in_their_rows(dtype: torch.dtype) -> None:
    m = mixed([3, 0, 40, 9], k=128, dtype=dtype)
    dy = m.g.dy()
    clean = m.forward(), m.dx(dy), *m.dlora(dy)
    m.lora_a[2][:, 1, 5], m.lora_a[2][2, 0, 9], m.lora_b[2][:, 7, 3] = torch.inf, torch.nan, -torch.inf
    others = m.of_row != 2
    ranks = [*range(4), *range(12, 15)]  # of the others
    y, dx, da, db = m.forward(), m.dx(dy), *m.dlora(dy)
    assert not y[~others].isfinite().all()
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(dx[others], clean[1][others])
    assert torch.equal(da[:, ranks], clean[2][:, ranks])
    assert torch.equal(db[..., ranks], clean[3][..., ranks])


@pytest.mark.parametrize("counts", [[40, 2, 1, 3, 0, 5, 2, 2], [1] * 9, [20, 30]], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(counts: list[int]) -> None:
    m, threads = mixed(counts, dropout_p=0.3), torch.get_num_threads()
    dy, results = m.g.dy(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append((*m.forward(with_h=True), *m.dx(dy, with_g=True), *m.dlora(dy)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.parametrize("of_row", [-1, 1, 2])  # none, an adapter of rank 0, and another one
def test_one_adapter_for_all_rows(of_row: int) -> None:
    m = mixed([3, 0, 9])
    m.of_row.fill_(of_row)
    m.check()


def test_without_rows_or_experts() -> None:
    mixed([0, 0]).check()
    m = mixed([0, 0], unassigned=0)
    m.check()
    da, db = m.dlora(m.g.dy())
    assert (da.shape, db.shape) == ((2, 15, 64), (2, 48, 15))
    assert not da.any()
    assert not db.any()


def test_gradients() -> None:
    m = mixed([5, 0, 3, 12], dropout_p=0.2, seeds=[3, 4, 5, 6])
    leaves = [t.requires_grad_() for t in (m.g.x, m.g.bias, *m.lora_a, *m.lora_b)]
    y, dy = m.forward(), m.g.dy()
    dx, dbias, *lora = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        assert torch.equal(dx, m.dx(dy))
        _, h = m.forward(with_h=True)
        da, db = m.dlora(dy, h=h, g=m.dx(dy, with_g=True)[1])
    assert torch.equal(torch.cat(lora[:4], 1), da)
    assert torch.equal(torch.cat(lora[4:], 2), db)
    torch.testing.assert_close(dbias, torch.stack([t.sum(0) for t in dy[:-3].split([5, 0, 3, 12])]))


def test_gradcheck() -> None:
    m = mixed([3, 0, 2], (2, 0, 3), n=6, k=10, dtype=torch.float64, block_size=32, dropout_p=0.4)
    leaves = [t.requires_grad_() for t in (m.g.x, m.g.bias, *m.lora_a, *m.lora_b)]
    assert torch.autograd.gradcheck(lambda *_: m.forward(), leaves)


def test_opcheck() -> None:
    m = mixed([2, 0, 3], dropout_p=0.2, seeds=[1, 2, 3, 4])
    trained = {name: t.requires_grad_() for name, t in m.lora(None).items() if name in ("lora_a", "lora_b")}
    x, dy = m.g.x.clone().requires_grad_(), m.g.dy()
    weight, lora = m.weight, {**m.lora(None), **trained}
    forward = {**weight, "out_features": m.g.n, "bias": m.g.bias}
    torch.library.opcheck(OPS.grouped_linear_nf4.default, (), {"x": x, **forward, **lora}, test_utils=OPCHECKS)
    lora = m.lora(None)
    _, h = m.forward(with_h=True)
    _, g = m.dx(dy, with_g=True)
    backward = {"dy": dy, **weight, "in_features": m.g.k, **lora}
    for name, args in (
        ("grouped_linear_nf4_with_h", {"x": m.g.x, **forward, **lora}),
        ("grouped_linear_nf4_dx", backward),
        ("grouped_linear_nf4_dx_with_g", backward),
        ("grouped_linear_nf4_dlora", {"dy": dy, "x": m.g.x, "offsets": m.g.offsets, **lora, "h": h, "g": g}),
    ):
        torch.library.opcheck(getattr(OPS, name).default, (), args, test_utils=OPCHECKS)


def test_vmap() -> None:
    m = mixed([2, 0, 3], dropout_p=0.3)
    xs = torch.randn(3, *m.g.x.shape)

    def call(x: Tensor) -> Tensor:
        return dataclasses.replace(m, g=dataclasses.replace(m.g, x=x)).forward()

    assert torch.equal(torch.func.vmap(call)(xs), torch.stack([call(x) for x in xs]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_of_row": torch.full((8,), 4, dtype=torch.int32)}, "adapter_of_row: .* -1 .* 3, got 4"),
        ({"adapter_of_row": torch.zeros(5, dtype=torch.int32)}, r"adapter_of_row: expected shape \[8\]"),
        ({"adapter_of_row": None}, "rank_offsets: expected None without adapter_of_row"),
        ({"rank_offsets": torch.tensor([0, 4, 4, 12, 14], dtype=torch.int32)}, "rank_offsets: expected 15 last"),
        ({"scalings": None}, "scalings: expected a tensor"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds: expected shape \[4\]"),
        ({"max_rank": 7}, "max_rank: expected 8"),
        ({"scaling": 2.0}, "scaling: expected 1.0"),
        ({"lora_a": None, "lora_b": None}, "lora_a: expected a tensor"),
        ({"lora_a": torch.zeros(15, 64)}, r"lora_a: expected shape \[3, any, 64\]"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    m = mixed([2, 0, 3])
    arguments = {"x": m.g.x, **m.weight, "out_features": m.g.n, "bias": None, **m.lora(None), **changes}
    with pytest.raises(ValueError, match=message):
        OPS.grouped_linear_nf4(**arguments)


def test_stacks_that_do_not_fit_are_named() -> None:
    a, b = [torch.zeros(3, 4, 64), torch.zeros(3, 2, 64)], [torch.zeros(3, 48, 4), torch.zeros(3, 48, 2)]
    stacked = stack_adapters(a, b)
    assert (stacked.lora_a.shape, stacked.lora_b.shape, stacked.max_rank) == ((3, 6, 64), (3, 48, 6), 4)
    for name, change, message in (
        ("lora_a", torch.zeros(2, 2, 64), r"lora_a\[1\]: expected three dimensions, the first of size \[3\]"),
        ("lora_b", torch.zeros(48, 2), r"lora_b\[1\]: expected three dimensions"),
        ("lora_a", torch.zeros(3, 2, 63), r"lora_a\[1\]: expected 64 columns"),
        ("lora_b", torch.zeros(3, 48, 3), r"lora_b\[1\]: expected 2 columns \(the rank of lora_a\[1\]\)"),
    ):
        given = {"lora_a": a, "lora_b": b}
        with pytest.raises(ValueError, match=message):
            stack_adapters(**{**given, name: [given[name][0], change]})


@pytest.mark.cuda
def test_cuda_takes_one_adapter_per_call() -> None:
    m = mixed([2, 0, 3], device="cuda")
    dy = m.g.dy()
    for call in (m.forward, lambda: m.dx(dy), lambda: m.dlora(dy)):
        with pytest.raises(ValueError, match=r"adapter_of_row: .* run on the CPU only, got d?[xy] on cuda"):
            call()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="adapter_of_row: .* CPU only"):
        m.forward()
