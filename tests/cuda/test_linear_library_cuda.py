"""Many tokens on CUDA: a panel of the weight is decoded and a library multiplies; only the total is rounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accuracy import assert_accurate, given, sums
from samples import DTYPES, LinearSample, linear_sample, to_f64

pytestmark = pytest.mark.cuda

OPS = torch.ops.qlora
HALF = [torch.bfloat16, torch.float16]
MANY = 200
FORMS = [
    {},
    {"bias": False},
    {"rank": None},
    {"rank": None, "bias": False},
    {"rank": 5, "dropout_p": 0.3},
    {"dropout_p": 1.0},
    {"double_quant": False},
    {"rank": 80},
]


@pytest.fixture(autouse=True)
def by_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "library")  # the crossover differs between cards


def check(s: LinearSample) -> None:
    m, (n, k) = s.x.shape[:-1].numel(), s.w4.shape
    y = OPS.linear_nf4(*s.args)
    assert_accurate(y, s.forward_accuracy())
    assert torch.equal(y, OPS.linear_nf4(*s.args))
    generator = torch.Generator().manual_seed(5)
    dy = torch.randn(m, n, generator=generator).to("cuda", s.x.dtype)
    dx = OPS.linear_nf4_dx(*s.dx_args(dy))
    assert_accurate(dx.view(m, k), s.dx_accuracy(dy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_input_gradient(form: dict, dtype: torch.dtype) -> None:
    check(linear_sample(m=MANY, n=48, k=128, dtype=dtype, device="cuda", **form))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ragged_shape(dtype: torch.dtype) -> None:
    check(linear_sample(m=(2, 75), n=33, k=101, rank=3, dtype=dtype, device="cuda", dropout_p=0.2))


def test_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole panels and a partial one, in the forward and in dX."""
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "library:panel=256")
    check(linear_sample(MANY, 704, 704, 4, torch.bfloat16, "cuda", dropout_p=0.2, block_size=128))


@pytest.mark.parametrize("rank", [1, 6, 16])
def test_small_panels_and_retained_products(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B200's library adds LoRA and bias itself, if dX has no dropout: h and g are also rows of an operand."""
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "library:panel=256")
    s = linear_sample(MANY, 300, 320, rank, torch.bfloat16, "cuda")
    check(s)
    dy = torch.randn(MANY, 300, generator=torch.Generator().manual_seed(6)).to("cuda", s.x.dtype)
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
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_float32_under_all_torch_settings(dtype: torch.dtype) -> None:
    check(linear_sample(m=MANY, n=40, k=256, dtype=dtype, device="cuda"))
    a = torch.randn(64, 64, device="cuda")
    assert torch.backends.cuda.matmul.allow_tf32
    torch.mm(a, a)  # torch's own products still use torch's settings: no exception, no changed state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(72, 192), (41, 95)])
def test_few_tokens(n: int, k: int, dtype: torch.dtype) -> None:
    check(linear_sample(3, n, k, 16, dtype, "cuda", dropout_p=0.2))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_outputs_or_terms(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel that is chosen: the library has nothing to multiply."""
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "")
    s = linear_sample(MANY, rows, 64, None, torch.bfloat16, "cuda")
    assert OPS.linear_nf4(*s.args).shape == (MANY, rows)
    dy = torch.randn(MANY, rows).to("cuda", s.x.dtype)
    dx = OPS.linear_nf4_dx(*s.dx_args(dy))
    assert_accurate(dx, s.dx_accuracy(dy))
