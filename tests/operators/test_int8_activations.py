"""``activations="int8"``: the arithmetic of every form against the oracle, its error bound, and what stays exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import int8_activations as int8
import isas
import qlora_ext
from accuracy import assert_accurate
from adapter_samples import Batch, ExpertBatch, batch, expert_batch
from forms import FORMS
from grouped_samples import grouped_sample
from int8_activations import INT8
from qlora_ext import _C
from samples import DTYPES, OPCHECKS, OPS, LinearSample, gradients, linear_sample, to_f64

test_on = isas.test_on
# Tokens and rows of the weight: one, few, a tile, many; and dy with whole segments, and with a last one of 16.
SIZES = [(1, 64), (7, 80), (64, 80), (300, 128)]


def forward(s: LinearSample, with_h: bool = False):
    return (OPS.linear_nf4_with_h if with_h else OPS.linear_nf4)(*s.args, activations=INT8)


def dx(s: LinearSample, dy: Tensor, with_g: bool = False):
    return (OPS.linear_nf4_dx_with_g if with_g else OPS.linear_nf4_dx)(*s.dx_args(dy), activations=INT8)


def check(s: LinearSample, dy: Tensor | None = None) -> None:
    """Both directions against the oracle, and within the bound of the exact result."""
    dy = s.dy() if dy is None else dy
    directions = [(forward(s), int8.forward(s), s.forward_accuracy(), int8.forward_bound(s))]
    if s.w4.block_size < int8.LEAST_DX_BLOCK:
        assert torch.equal(dx(s, dy), s.dx(dy))
    else:
        directions.append((dx(s, dy), int8.dx(s, dy), s.dx_accuracy(dy), int8.dx_bound(s, dy)))
    for found, expected, exact, bound in directions:
        assert_accurate(found, expected)
        assert (np.abs(to_f64(found) - exact.exact) <= bound + np.maximum(exact.bound, expected.bound)).all()


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str) -> None:
    for m, n in SIZES:
        check(int8.sample(form, m, n, 256))


@pytest.mark.parametrize("kernel", ["few_tokens_int8", "many_tokens_int8"])
def test_every_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the numbers of tokens for which it is not chosen."""
    monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
    for dtype in DTYPES:
        for m, n in ((1, 96), (8, 70), (33, 512)):
            for form in ("nf4", "q4_1", "nvfp4"):
                s = int8.sample(form, m, n, 320, dtype=dtype)
                assert_accurate(forward(s), int8.forward(s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["nf4", "q4_0", "q4_1", "made up"])
def test_with_bias_and_dropped_out_lora(form: str, dtype: torch.dtype) -> None:
    for m, n in SIZES:
        s = int8.sample(form, m, n, 192, rank=8, dtype=dtype, dropout_p=0.25)
        dy = s.dy()
        check(s)
        assert_accurate(forward(s, with_h=True)[1], s.h_accuracy())  # of the exact x
        assert_accurate(dx(s, dy, with_g=True)[1], s.g_accuracy(dy))


@pytest.mark.parametrize("block_size", [16, 128, 256])
def test_other_blocks(block_size: int) -> None:
    """Several scales in a segment, and blocks that begin in the middle of a row."""
    for m in (1, 7, 70):
        check(linear_sample(m, 48, 320, rank=None, bias=False, block_size=block_size))


def _with_zeros(x: Tensor) -> None:
    x[0, :64], x[1] = 0, 0


def _with_large(x: Tensor) -> None:
    x[:, 5], x[2, 33] = 3e4, -3e38


def _tiny(x: Tensor) -> None:
    x *= 2.0**-110
    x[0] *= 2.0**-30  # subnormal


@pytest.mark.parametrize("change", [_with_zeros, _with_large, _tiny])
def test_segments_of_every_size(change) -> None:
    """A large element takes the precision of its own segment only, and tiny ones have a unit of their own."""
    for m in (3, 70):
        s = int8.sample("q4_0", m, 64, 192, bias=False)
        change(s.x)
        check(s)
        dy = s.dy()
        change(dy)
        assert_accurate(dx(s, dy), int8.dx(s, dy))
    rest = dataclasses.replace(s, x=s.x.clone())
    rest.x[:, :64] = 0
    own = dataclasses.replace(s, x=s.x - rest.x)
    y, parts = to_f64(forward(s)), to_f64(forward(own)) + to_f64(forward(rest))
    np.testing.assert_allclose(y, parts, rtol=1e-5, atol=1e-6 * np.abs(y).max(initial=0))


def test_fractions_whose_products_are_small() -> None:
    """Where dy is large only where scales are small, or has no fractions, products are rounded in float32."""
    for m in (3, 70):
        s = int8.sample("nf4", m, 192, 192, bias=False)
        dy = s.dy()
        s.w4.absmax.view(192, -1)[5] *= 1000
        dy[:, 5] = 0
        dy[0, 64:128] *= 2.0**-60
        dy[1, 128:] *= 2.0**70
        check(s, dy)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times a weight of 0
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(value: float) -> None:
    for m in (2, 70):
        s = int8.sample("q4_0", m, 64, 192)
        dy = s.dy()
        y, dx_before = forward(s), dx(s, dy)
        s.x[1, 100] = dy[1, 33] = value
        weight = s.decoded()
        for found, clean, other in (
            (forward(s), y, value * weight[:, 100]),
            (dx(s, dy), dx_before, value * weight[33]),
        ):
            expected = clean.double()
            expected[1] = torch.from_numpy(other)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("k", "options"),
    [(96, {}), (63, {}), (1, {}), (0, {}), (128, {"dtype": torch.float64}), (64, {"m": 0})],
    ids=str,
)
def test_what_it_cannot_serve_is_exact(k: int, options: dict) -> None:
    s = linear_sample(**{"m": 70, "k": k, **options})
    dy = s.dy()
    assert torch.equal(forward(s), s.forward())
    assert torch.equal(dx(s, dy), s.dx(dy))


@pytest.mark.cuda
def test_cuda_is_exact() -> None:
    s = linear_sample(5, device="cuda")
    dy = s.dy()
    assert torch.equal(forward(s), s.forward())
    assert torch.equal(dx(s, dy), s.dx(dy))


@pytest.mark.parametrize("counts", [[0, 3, 0, 17, 1], [0, 130, 0, 70, 2]])
@pytest.mark.parametrize("form", ["nf4", "q4_1"])
def test_experts(form: str, counts: list[int]) -> None:
    g = grouped_sample(counts, 80, 128, form=FORMS[form])
    dy = g.dy()
    y = OPS.grouped_linear_nf4(g.x, g.offsets, *g.args(), activations=INT8)
    dxs = OPS.grouped_linear_nf4_dx(dy, g.offsets, *g.dx_args(), activations=INT8)
    for e, rows in g.parts():
        one = g.of_expert(e, g.x[rows])
        assert_accurate(y[rows], int8.forward(one))
        assert_accurate(dxs[rows], int8.dx(one, dy[rows]))
    assert not y[g.unassigned()].any()
    assert not dxs[g.unassigned()].any()


@pytest.mark.parametrize("make", [batch, expert_batch])
@pytest.mark.parametrize("m", [9, 80])
def test_each_row_has_the_bits_of_its_adapter_alone(make, m: int) -> None:
    b: Batch | ExpertBatch = make(m, k=128, dropout_p=0.25)
    for name, dy in (("", None), ("_dx", b.dy())):
        together = b.run(name, dy=dy, activations=INT8)
        assert not torch.equal(together, b.run(name, dy=dy))
        for e in {*b.of_row.tolist()}:
            own = b.of_row == e
            assert torch.equal(together[own], b.run(name, e, dy, activations=INT8)[own])


@pytest.mark.parametrize("m", [1, 70])
def test_the_number_of_threads_does_not_matter(m: int) -> None:
    s = linear_sample(m, 512, 1024, rank=8, dropout_p=0.25)
    dy = s.dy()

    def results(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            return [forward(s), dx(s, dy)]
        finally:
            torch.set_num_threads(before)

    assert all(map(torch.equal, results(1), results(2)))


def test_gradients() -> None:
    """dx in the mode, the others from the exact x and dy; alike in a graph and under autocast."""
    s = linear_sample(70, k=128, dropout_p=0.25, requires_grad=True)

    def layer() -> Tensor:
        return qlora_ext.linear_nf4(s.x, s.w4, s.bias, *s.lora_args, activations=INT8)

    y, grad_x, grad_bias, grad_a, grad_b = gradients(layer, s)
    dy = 2 * y
    h, g = forward(s, with_h=True)[1].detach(), dx(s, dy, with_g=True)[1]
    assert torch.equal(y, forward(s))
    assert not torch.equal(y, s.forward())
    assert torch.equal(grad_x, dx(s, dy))
    assert torch.equal(grad_bias, dy.sum(0))
    assert all(map(torch.equal, (grad_a, grad_b), s.dlora(dy, h=h, g=g)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, s), (y, grad_x, grad_bias, grad_a, grad_b)))
    with torch.autocast("cpu", torch.bfloat16):
        half = layer()
        assert not torch.equal(half, qlora_ext.linear_nf4(s.x, s.w4, s.bias, *s.lora_args))
    assert half.dtype == torch.bfloat16


def test_opcheck() -> None:
    s = linear_sample(3, requires_grad=True)
    torch.library.opcheck(OPS.linear_nf4.default, s.args, {"activations": INT8}, test_utils=OPCHECKS)


def test_other_names_are_refused() -> None:
    s = linear_sample()
    for call in (
        lambda: OPS.linear_nf4(*s.args, activations="int4"),
        lambda: OPS.linear_nf4(s.x.to("meta"), *s.args[1:], activations="int4"),
        lambda: qlora_ext.linear_nf4(s.x, s.w4, activations="int4"),
        lambda: _C.choose("linear_nf4", "float32", 1, 64, 64, activations="int4"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"activations: expected exact or int8, got '?int4"):
            call()
