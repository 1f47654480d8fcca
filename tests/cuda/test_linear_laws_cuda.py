"""Laws that every kernel of the linear operators on CUDA obeys, besides the results that test_linear_cuda.py compares:
where NaN goes, which bits do not change, streams and graphs, arguments of any layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import qlora_ext
from accuracy import assert_accurate, given, rounded, sums, total
from cuda_cases import BF16, DLORA, DX, F16, FEW, FORWARD, HALF, Case, case, each, on_newer
from operator_results import OPS, call, check_samples, forward, gradient
from operator_results import dx as input_gradient
from samples import DTYPES, LinearSample, linear_sample, relative_error, rows, to_f64

pytestmark = pytest.mark.cuda
VARIABLE = "QLORA_CUDA_KERNEL"


def run(op: str, s: LinearSample, dy: Tensor) -> Tensor:
    return call(op, s, dy)[0]


@pytest.fixture(autouse=True)
def _forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "case" in request.fixturenames:
        monkeypatch.setenv(VARIABLE, request.getfixturevalue("case").kernel)


def moved(t: Tensor) -> Tensor:
    """The same values, contiguous, but one element past a 16-byte boundary."""
    out = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view_as(t).copy_(t)
    assert out.data_ptr() % 16 != 0
    return out


@each(
    [
        *(case(op, 6, 64, 128 if op == FORWARD else 96, 6, dtype) for op in (FORWARD, DX) for dtype in DTYPES),
        *(case(FORWARD, m, 64, 256, 6) for m in (1, 16)),
        *(case(FORWARD, 40, 64, 128, 6, dtype, kernel) for dtype in HALF for kernel in ("sm90", "sm100")),
    ]
)
def test_operands_at_any_address(case: Case) -> None:
    s, dy = case.sample()
    expected = to_f64(run(case.op, s, dy))
    tolerance = (4 if case.op == FORWARD else 2) * torch.finfo(case.dtype).eps
    if case.op == DX:
        assert relative_error(run(DX, s, moved(dy)), expected) < tolerance
        return
    for name in ("bias", "lora_a", "lora_b", "x"):
        if name == "x" and case.kernel:
            continue  # TMA does not take it
        setattr(s, name, moved(getattr(s, name)))
        assert relative_error(run(FORWARD, s, dy), expected) < tolerance
    if not case.kernel:
        x, packed, *rest = s.args
        assert relative_error(OPS.linear_nf4(x, moved(packed), *rest), expected) < tolerance


@each(
    [
        *(case(FORWARD, m, 40, k, None, double_quant=False) for m, k in ((3, 128), (3, 95), (40, 128))),
        case(FORWARD, 40, 40, 192, None, kernel="sm90", double_quant=False),  # a row ends in the middle of a stage
        case(FORWARD, 40, 40, 192, None, kernel="sm100", double_quant=False),
        case(DX, 40, 72, 192, None, kernel="sm100", double_quant=False),
        case(DX, 40, 72, 192, None, kernel="sm90", double_quant=False),
    ]
)
def test_a_block_that_is_nan_gives_nan(case: Case) -> None:
    """In its row, or columns of dX, and in no others, as with decoding."""
    s, dy = case.sample()
    s.w4.absmax[7 * case.k // 64] = float("nan")
    touched = np.isnan(s.decoded()).any(axis=1 if case.op == FORWARD else 0)
    assert 0 < touched.sum() < touched.size
    y = to_f64(run(case.op, s, dy))
    assert np.array_equal(np.isnan(y), np.broadcast_to(touched, y.shape))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@each(
    [
        *(case(FORWARD, m, 72, 320) for m in (1, 7, 16)),
        *(case(FORWARD, m, 40, 128, None, dtype) for m in (8, 64) for dtype in HALF),
        *(case(op, 64, 72, 128, None, dtype, "sm90") for op in (FORWARD, DX) for dtype in HALF),
        *(case(op, 64, 72, 128, None, dtype, "sm100") for op in (FORWARD, DX) for dtype in HALF),
    ]
)
def test_values_that_are_not_finite_stay_in_their_token(case: Case, bad: float) -> None:
    s, dy = case.sample()
    expected = run(case.op, s, dy)
    token = case.m // 2
    (s.x if case.op == FORWARD else dy)[token, 69 % case.n] = bad
    y = run(case.op, s, dy)
    assert not y[token].isfinite().any()
    others = torch.arange(case.m) != token
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("nested_block_size", [1, 3, 100, 256])
@each(
    [
        case(FORWARD, 3, 70, 320, 4, double_quant=False),
        *(case(FORWARD, 34, 70, 832, 4, kernel=kernel, double_quant=False) for kernel in ("sm90", "sm100")),
    ]
)
def test_any_nested_block_size(case: Case, nested_block_size: int) -> None:
    s, _ = case.sample()
    codes, nested_absmax, nested_offset = OPS.quantize_absmax(s.w4.absmax, nested_block_size)
    w = OPS.dequantize_absmax(codes, nested_absmax, nested_offset, nested_block_size)
    x, packed, _, _, _, block_size, _, *rest = s.args
    plain = OPS.linear_nf4(x, packed, w, None, None, block_size, 256, *rest)
    nested = OPS.linear_nf4(x, packed, codes, nested_absmax, nested_offset, block_size, nested_block_size, *rest)
    assert torch.equal(plain, nested)


# A library, which some cards choose at 64 tokens, multiplies by the rounded weights.
@each(
    [
        case(FORWARD, m, 256, 512, None, kernel=k, bias=False)
        for m, k in ((FEW, "few_tokens"), (16, "tensor_cores"), (64, "tensor_cores"), (64, "sm90"))
    ]
)
def test_codes_have_little_more_than_half_the_error_of_rounded_weights(case: Case) -> None:
    """bfloat16. Both outputs are rounded in the same way, and this error is subtracted from both squares. A factor that
    halved the error (a quarter of its square) would not keep the codes of -1 and 1 exact."""
    [(y, expected)] = forward(*case.sample())
    rounding = relative_error(rounded(expected.exact, BF16), expected.exact) ** 2
    error = relative_error(y, expected.exact) ** 2 - rounding
    plain = relative_error(expected.formula, expected.exact) ** 2 - rounding
    assert plain > 0
    assert error <= plain / 3, (error, plain)


@each([case(FORWARD, 300, 5100, 64, 8, kernel="sm90"), case(FORWARD, 300, 700, 64, 8, kernel="sm100")])
def test_a_token_does_not_depend_on_the_others(case: Case) -> None:
    """Except for the order of summation, which depends on the tile and the splits."""
    s, dy = case.sample()
    complete = run(FORWARD, s, dy)
    s.x = s.x[130:].contiguous()
    assert relative_error(run(FORWARD, s, dy), to_f64(complete[130:])) < torch.finfo(BF16).eps


# Sums that are split, whose parts meet in a workspace: few tokens and many, on Hopper by wgmma.
ON_STREAMS = [
    *(
        case(FORWARD, m, 136, k, 8, dropout_p=0.1)
        for m, k in ((2, 2112), (9, 2112), (20, 1088), (40, 1088), (100, 1088))
    ),
    *(case(DX, m, n, 64, 4, dropout_p=0.5) for m, n in ((5, 2056), (40, 1032))),
]


def test_two_streams_and_graphs() -> None:
    """Each graph is captured on one stream, as torch does. It has its own workspace, and restores it."""
    samples = [(c.op, *c.sample()) for c in ON_STREAMS]
    expected = [run(*sample) for sample in samples]
    graphs, captured = [], []
    for sample in samples:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(run(*sample))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in samples]
    for _ in range(2):
        results = []
        for y in captured:
            y.zero_()
        torch.cuda.synchronize()
        for sample, graph, stream in zip(samples, graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(*sample))
                graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))
        assert all(map(torch.equal, captured, expected))


@each([case(DX, 40, 72, 128, 4, kernel=kernel, dropout_p=0.5) for kernel in ("", "sm90", "sm100")])
def test_a_seed_on_the_device_draws_the_same_mask(case: Case) -> None:
    s, dy = case.sample()
    *lora, seed = s.lora_args
    on_device = torch.tensor(seed, device="cuda")
    assert torch.equal(OPS.linear_nf4_dx(dy, *s.w4.operands(128, *lora, 0, on_device)), run(DX, s, dy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 0, 3), (2, 3), ()])
def test_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    s = linear_sample(shape, 40, 128, 4, dtype, "cuda")
    dy = gradient(s)
    y, dx, (da, db) = run(FORWARD, s, dy), run(DX, s, dy), call(DLORA, s, dy)
    assert (y.shape, dx.shape, da.shape, db.shape) == (dy.shape, s.x.shape, s.lora_a.shape, s.lora_b.shape)
    if y.numel():
        assert relative_error(y, s.expected()) < 4 * torch.finfo(dtype).eps
    else:
        assert not da.any()
        assert not db.any()


def test_non_contiguous_x() -> None:
    s, dy = case(FORWARD, 6, 40, 128, 4).sample()
    expected = run(FORWARD, s, dy)
    s.x = s.x.t().contiguous().t()
    assert not s.x.is_contiguous()
    assert torch.equal(run(FORWARD, s, dy), expected)


@pytest.mark.parametrize("outputs", [0, 3])
def test_no_outputs_or_terms(outputs: int) -> None:
    s, dy = case(FORWARD, 200, outputs, 64, None).sample()
    assert run(FORWARD, s, dy).shape == (200, outputs)
    assert_accurate(run(DX, s, dy), s.dx_accuracy(dy))


@pytest.mark.parametrize("dtype", HALF)
def test_parts_of_h_beyond_the_range_of_h(dtype: torch.dtype) -> None:
    """Slices of k cancel: partial sums must not be rounded to float16, whose largest number is 65504."""
    s, dy = case(FORWARD, 2, 64, 4096, 16, dtype).sample()
    s.x[:, :2048], s.x[:, 2048:] = 100.0, -100.0
    s.lora_a[:] = 1.0
    s.lora_a[:, 0] += torch.arange(16).to(s.lora_a) / 8
    s.lora_b *= 0.01
    check_samples(forward, lambda seed: (s, dy), 0)
    parts = to_f64(s.x)[:, :2048] @ to_f64(s.lora_a).T[:2048]
    assert abs(parts).min() > torch.finfo(torch.float16).max


@on_newer
def test_h_is_more_exact_than_the_formula() -> None:
    s, dy = case(FORWARD, 8, 256, 512, 16, F16, bias=False).sample()
    for scales in (s.w4.absmax, s.w4.nested_absmax, s.w4.nested_offset):
        scales.zero_()
    [(y, expected)] = forward(s, dy)
    h = to_f64(s.x) @ to_f64(s.lora_a).T * s.scaling
    assert abs(h @ to_f64(s.lora_b).T - expected.exact).max() < 1e-9
    assert (rows(y) == rounded(expected.exact, F16)).mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"rank": None}, {"dropout_p": 0.4}, {"rank": 1, "double_quant": False}], ids=str
)
def test_backward_of_the_layer(options: dict, dtype: torch.dtype) -> None:
    s = linear_sample((2, 9), 72, 96, dtype=dtype, device="cuda", requires_grad=True, **options)
    y = qlora_ext.autograd.LinearNF4Function.apply(*s.args)
    dy = gradient(s)
    y.backward(dy)
    assert_accurate(s.x.grad, s.dx_accuracy(dy))
    assert_accurate(s.bias.grad, total(rows(dy), dtype))
    if s.lora_a is not None:
        for got, expected in zip((s.lora_a.grad, s.lora_b.grad), s.dlora_accuracy(dy), strict=True):
            assert_accurate(got, expected)


@each([case(FORWARD, 70, 600, 592, 8, kernel="gemm", dropout_p=0.4, block_size=128)])
def test_panels_and_ctas_change_no_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three panels, the last of which is not whole, against a single one. The mask counts columns over all panels. The
    sums are cut into two parts each, so that without a limit 6 CTAs run, or 2 for each panel."""
    s, dy = case.sample()
    whole = run(FORWARD, s, dy), check_samples(input_gradient, case.sample, 0)[0]
    for parameters in ("panel=256", "ctas=1", "ctas=4", "ctas=5,panel=512", "ctas=1000"):
        monkeypatch.setenv(VARIABLE, f"gemm:{parameters}")
        assert all(map(torch.equal, whole, (run(FORWARD, s, dy), run(DX, s, dy)))), parameters


@each([case(FORWARD, 1300, 2600, 512, 8, kernel="gemm", double_quant=False)])
def test_whole_and_cut_sums_in_a_panel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """121 tiles, of which an A100 computes 99 whole. The second panel has whole ones and others."""
    [y] = check_samples(forward, case.sample, 0)
    monkeypatch.setenv(VARIABLE, "gemm:ctas=31,panel=1280")
    assert torch.equal(run(FORWARD, *case.sample()), y)


@each([case(FORWARD, 200, 300, 320, rank, kernel="library:panel=256") for rank in (1, 6, 16)])
def test_small_panels_and_retained_products(case: Case) -> None:
    """B200's library adds LoRA and bias itself, if dX has no dropout: h and g are also rows of an operand."""
    s, dy = case.sample()
    for results in (forward, input_gradient):
        check_samples(results, case.sample, 0)
    y, h = OPS.linear_nf4_with_h(*s.args)
    dx, g = OPS.linear_nf4_dx_with_g(*s.dx_args(dy))
    assert_accurate(y, s.forward_accuracy())
    assert_accurate(dx, s.dx_accuracy(dy))
    for got, x, factor in ((h, s.x, s.lora_a.T), (g, dy, s.lora_b)):
        assert_accurate(got, sums([(given(to_f64(x)), given(s.scaling * to_f64(factor)), 1.0)], 0.0, s.x.dtype))


@pytest.fixture
def loose_settings() -> Iterator[None]:
    """All settings of torch that make cuBLAS less accurate."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    for name in names:
        setattr(matmul, name, True)
    yield
    for name, value in before.items():
        setattr(matmul, name, value)


@pytest.mark.usefixtures("loose_settings")
@each([case(FORWARD, 200, 40, 256, 4, dtype, "library") for dtype in DTYPES])
def test_sums_are_float32_under_all_torch_settings(case: Case) -> None:
    for results in (forward, input_gradient):
        check_samples(results, case.sample)
    a = torch.randn(64, 64, device="cuda")
    assert torch.backends.cuda.matmul.allow_tf32
    torch.mm(a, a)  # torch's own products still use torch's settings: no exception, no changed state
