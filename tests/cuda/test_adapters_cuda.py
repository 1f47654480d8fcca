"""Several adapters in one call on CUDA: every row has the bits of the same call with its adapter alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from adapter_samples import Batch, ExpertBatch, batch, dx_args, expert_batch, forward_args
from forms import WIDE_FORMS, random_weight
from qlora_ext.form import Form
from qlora_ext.weight import quantize

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# m, n, k, dtype and ranks: the kernels for few and for many tokens; more adapters than a wgmma's chunk of ranks holds;
# rows that need the kernels for any shape; and float32.
SHAPES = [
    (9, 136, 576, BF16, (4, 0, 16, 8, 40)),
    (34, 72, 192, FP16, (4, 0, 16, 8, 40)),
    (34, 72, 128, BF16, (16,) * 10),
    (6, 37, 102, BF16, (5, 0, 40)),
    (19, 40, 96, FP32, (5, 0, 40, 16)),
]
# Kernels whose CTAs divide the ranks, and those for thousands of tokens: m, k, the kernel, the oldest and newest
# architecture, and whether dX has it.
FORCED = [
    (8, 1152, "few_tokens:splits=2", 80, 120, False),
    (20, 384, "tensor_cores:splits=2", 80, 120, True),
    (36, 384, "sm90:tokens=64,splits=2,multicast=1", 90, 90, True),
    (20, 384, "gemm", 80, 120, True),
    (20, 384, "library", 75, 90, True),  # on B200, the library adds a single adapter's terms itself
]


def without(b: Batch) -> Batch:
    """With an adapter of zeros in place of those of rank 0 and of none, which is added as the last one."""
    n, k = b.w4.shape
    a, lora_b = b.x.new_zeros(4, k), b.x.new_zeros(n, 4)
    is_empty = [t.shape[0] == 0 for t in b.lora_a]
    return dataclasses.replace(
        b,
        lora_a=[*(a if empty else t for t, empty in zip(b.lora_a, is_empty, strict=True)), a],
        lora_b=[*(lora_b if empty else t for t, empty in zip(b.lora_b, is_empty, strict=True)), lora_b],
        scaling=[*b.scaling, 1.0],
        seeds=[*b.seeds, 0] if b.seeds else None,
    )


def forward_alone(b: Batch, adapter: int) -> tuple[Tensor, Tensor]:
    seed = b.seeds[adapter] if b.seeds else 7
    lora = b.lora_a[adapter], b.lora_b[adapter], b.scaling[adapter], b.dropout_p, seed, None
    return OPS.linear_nf4_with_h(b.x, *b.w4.operands(b.w4.shape[0], b.bias, *lora))


def check(b: Batch, got: tuple[Tensor, Tensor], alone, rows: Tensor | None) -> None:
    """The results and the retained h or g of some rows, against calls with one adapter."""
    for e in set(b.of_row.tolist()):
        of_e = b.of_row == e
        if rows is not None:
            of_e &= rows
        rank = b.lora_a[e].shape[0] if e >= 0 else 0
        for ours, want, columns in zip(got, alone(e), (None, rank), strict=True):
            assert torch.equal(ours[of_e, :columns], want[of_e, :columns])
        assert not got[1][of_e, rank:].any()


def check_forward(b: Batch, rows: Tensor | None = None) -> None:
    y, h = OPS.linear_nf4_with_h(*forward_args(b))
    assert torch.equal(OPS.linear_nf4(*forward_args(b)).nan_to_num(7), y.nan_to_num(7))
    alone = without(b)
    check(b, (y, h), lambda e: forward_alone(alone, e), rows)


def check_dx(b: Batch, dy: Tensor, rows: Tensor | None = None) -> None:
    alone = without(b)
    got = OPS.linear_nf4_dx_with_g(*dx_args(b, dy, None))
    check(b, got, lambda e: OPS.linear_nf4_dx_with_g(*dx_args(alone, dy, e % len(alone.lora_a))), rows)


def cuda_batch(m: int, n: int, k: int, dtype: torch.dtype, ranks: tuple[int, ...], **options: object) -> Batch:
    b = batch(m, n, k, ranks, dtype, device="cuda", **options)
    b.of_row[0], b.of_row[1 % m] = -1, len(ranks) - 1
    return b


def cancelling(rows: int, columns: int) -> Tensor:
    half = 64 * torch.randn(rows, columns // 2)
    return torch.cat([half, -half], dim=1).to("cuda", FP16)


@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "dtype", "ranks"), SHAPES)
def test_rows_have_the_bits_of_their_adapter_alone(
    m: int, n: int, k: int, dtype: torch.dtype, ranks: tuple[int, ...], has_dropout: bool
) -> None:
    dropout = {"dropout_p": 0.4, "seeds": [11 * e for e in range(len(ranks))]} if has_dropout else {}
    b = cuda_batch(m, n, k, dtype, ranks, **dropout)
    b.of_row[2:].remainder_(3)  # fewer calls to compare with
    check_forward(b)
    check_dx(b, torch.randn(m, n).to("cuda", dtype))


@pytest.mark.parametrize("m", [11, 26])
@pytest.mark.parametrize("name", WIDE_FORMS)
def test_wide_codes(name: str, m: int) -> None:
    """On the kernels without tensor cores, and on decoded panels."""
    b = cuda_batch(m, 72, 128, BF16, (4, 0, 40), dropout_p=0.4, seeds=[1, 2, 3])
    b = dataclasses.replace(b, w4=random_weight(WIDE_FORMS[name], (72, 128), device="cuda"))
    check_forward(b)
    check_dx(b, torch.randn(m, 72).to("cuda", BF16))


@pytest.mark.parametrize(("m", "k", "kernel", "oldest", "newest", "has_dx"), FORCED)
def test_kernels_that_divide_the_ranks(
    m: int, k: int, kernel: str, oldest: int, newest: int, has_dx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = torch.cuda.get_device_capability()
    if not oldest <= 10 * major + minor <= newest:
        pytest.skip(f"{kernel} does not run on compute capability {major}.{minor}, or not for one adapter")
    monkeypatch.setenv("QLORA_CUDA_KERNEL", kernel)
    # The base's parts are large and cancel, and what they round off the adapter's product tells which part it was in.
    b = cuda_batch(m, 128, k, FP16, (130, 16, 3), dropout_p=0.3)
    b = dataclasses.replace(b, w4=quantize(torch.randn(64, k // 2, device="cuda").repeat(2, 2), Form.of()), bias=None)
    check_forward(dataclasses.replace(b, x=cancelling(m, k), lora_a=[t / 64 for t in b.lora_a]))
    if has_dx:
        check_dx(dataclasses.replace(b, lora_b=[t / 64 for t in b.lora_b]), cancelling(m, 128))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_values_that_are_not_finite_stay_in_their_rows(dtype: torch.dtype) -> None:
    b = cuda_batch(24, 72, 128, dtype, (4, 16, 8), dropout_p=0.3, seeds=[1, 2, 3])
    dy = torch.randn(24, 72).to("cuda", dtype)
    b.lora_a[1][3, 5], b.lora_a[1][0, 9], b.lora_b[1][7, 3] = torch.inf, torch.nan, -torch.inf
    b.x[b.of_row == 2] = torch.nan
    others = (b.of_row != 1) & (b.of_row != 2)
    assert others.any()
    check_forward(b, others)
    check_dx(b, dy, others)
    of_1 = b.of_row == 1
    for got, alone in (
        (OPS.linear_nf4(*forward_args(b)), forward_alone(b, 1)[0]),
        (OPS.linear_nf4_dx(*dx_args(b, dy, None)), OPS.linear_nf4_dx(*dx_args(b, dy, 1))),
    ):
        ours, want = got[of_1], alone[of_1]
        assert not ours.isfinite().all()
        assert torch.equal(ours.isfinite(), want.isfinite())
        assert torch.equal(ours[ours.isfinite()], want[want.isfinite()])


def test_values_of_b_that_are_not_finite() -> None:
    b = cuda_batch(40, 72, 128, BF16, (4, 16, 8))
    b.lora_b[2][5, 1], b.lora_b[2][6, 0] = torch.inf, torch.nan
    y, (alone, _), of_2 = OPS.linear_nf4(*forward_args(b)), forward_alone(b, 2), b.of_row == 2
    assert torch.equal(y[of_2].nan_to_num(7), alone[of_2].nan_to_num(7))
    assert (y[of_2][:, 5].isinf()).all()
    assert y[~of_2].isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_invalid_numbers_give_nan(dtype: torch.dtype) -> None:
    """The host does not see them. No kernel leaves the stacks, which the simulator checks."""
    b = cuda_batch(20, 40, 64, dtype, (4, 8))
    b.of_row[3], b.of_row[5] = 2, -7
    bad = torch.zeros(20, dtype=torch.bool, device="cuda")
    bad[[3, 5]] = True
    args, dy = list(forward_args(b)), torch.randn(20, 40).to("cuda", dtype)
    y, h = OPS.linear_nf4_with_h(*args)
    dx = OPS.linear_nf4_dx(*dx_args(b, dy, None))
    for t in (y, h, dx):
        assert torch.equal(t.isnan().all(1), bad)
        assert t[~bad].isfinite().all()
    for offsets in ([0, 4, 2**30], [-5, 4, 12], [9, 4, 12]):
        args[-4] = torch.tensor(offsets, dtype=torch.int32, device="cuda")
        y, wrong = OPS.linear_nf4(*args), [offsets[0] not in range(5), offsets[2] != 12]
        for e in (0, 1):
            assert bool(y[b.of_row == e].isnan().all()) == wrong[e]


def test_all_rows_without_adapter() -> None:
    for ranks in ((0, 0), (4, 8)):
        b = batch(5, 40, 64, ranks, BF16, device="cuda")
        b.of_row.fill_(-1)
        plain = OPS.linear_nf4(*forward_args(dataclasses.replace(b, lora_b=[t * 0 for t in b.lora_b])))
        assert torch.equal(OPS.linear_nf4(*forward_args(b)), plain)
        b.of_row[2] = 9
        assert torch.equal(OPS.linear_nf4(*forward_args(b)).isnan().all(1), b.of_row == 9)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("m", "k", "dtype"), [(20, 128, BF16), (300, 64, FP16), (13, 50, FP32)])
def test_gradients_of_a_and_b(m: int, k: int, dtype: torch.dtype, dropout_p: float) -> None:
    """Against the operator on the CPU. Rows of other adapters are not even multiplied by zero."""
    b = batch(m, 40, k, (4, 0, 8, 3), dtype, dropout_p=dropout_p, seeds=[5, 6, 7, 8])
    dy = torch.randn(m, 40).to(dtype)
    s = b.stacked()
    lora = s.lora_a, s.lora_b, 1.0, dropout_p, 0, None
    last = b.of_row, s.rank_offsets, s.scalings, s.seeds, s.max_rank
    tolerance = 1e-4 if dtype == FP32 else 3e-2

    def on_cuda(*args: object) -> tuple[Tensor, Tensor]:
        da, db = OPS.linear_nf4_dlora(*(t.cuda() if isinstance(t, Tensor) else t for t in args))
        return da.cpu(), db.cpu()

    expected = OPS.linear_nf4_dlora(dy, b.x, *lora, None, None, *last)
    got = on_cuda(dy, b.x, *lora, None, None, *last)
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    _, h = OPS.linear_nf4_with_h(*forward_args(b))
    _, g = OPS.linear_nf4_dx_with_g(*dx_args(b, dy, None))
    given = on_cuda(dy, b.x, *lora, h, g, *last)
    for ours, want in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    dy[b.of_row == 2], b.x[b.of_row == -1] = torch.nan, torch.inf
    for ours, clean in zip(on_cuda(dy, b.x, *lora, None, None, *last), got, strict=True):
        is_2 = torch.zeros(15, dtype=torch.bool)
        is_2[4:12] = True
        ours, clean = (ours, clean) if ours.shape[0] == 15 else (ours.T, clean.T)
        assert torch.equal(ours[~is_2], clean[~is_2])


def test_no_rows() -> None:
    b = batch(0, 40, 64, (4, 8), BF16, device="cuda")
    s = b.stacked()
    last = b.of_row, s.rank_offsets, s.scalings, None, s.max_rank
    lora = s.lora_a, s.lora_b, 1.0, 0.0, 0, None, None, None
    da, db = OPS.linear_nf4_dlora(b.x.new_zeros(0, 40), b.x, *lora, *last)
    assert da.shape == (12, 64)
    assert db.shape == (40, 12)
    assert not da.any()
    assert not db.any()
    assert OPS.linear_nf4(*forward_args(b)).shape == (0, 40)


def test_a_captured_graph_takes_other_adapters_at_each_replay() -> None:
    b = batch(9, 72, 128, (4, 16, 8), BF16, device="cuda")
    dy = torch.randn(9, 72).to("cuda", BF16)
    s = b.stacked()
    last = b.of_row, s.rank_offsets, s.scalings, s.seeds, s.max_rank
    lora = s.lora_a, s.lora_b, 1.0, 0.0, 7, None

    def step() -> tuple[Tensor, ...]:
        y, h = OPS.linear_nf4_with_h(b.x, *b.w4.operands(b.w4.shape[0], b.bias, *lora), *last)
        dx, g = OPS.linear_nf4_dx_with_g(dy, *b.w4.operands(b.x.shape[-1], *lora), *last)
        return y, dx, *OPS.linear_nf4_dlora(dy, b.x, *lora, h, g, *last)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for shift in range(2):
        b.of_row.copy_((b.of_row + 1 + shift) % 4 - 1)
        s.scalings.mul_(0.5)
        graph.replay()
        for ours, want in zip(captured, step(), strict=True):
            assert torch.equal(ours, want)


def test_autograd_and_arguments() -> None:
    b = batch(9, 40, 64, (4, 8), FP32, requires_grad=True, device="cuda")
    on_cpu = dataclasses.replace(
        b,
        x=b.x.detach().cpu().requires_grad_(),
        w4=b.w4.to("cpu"),
        bias=b.bias.detach().cpu(),
        lora_a=[t.detach().cpu().requires_grad_() for t in b.lora_a],
        lora_b=[t.detach().cpu().requires_grad_() for t in b.lora_b],
        of_row=b.of_row.cpu(),
    )
    dy = torch.randn(9, 40)
    for batch_of, gradient in ((b, dy.cuda()), (on_cpu, dy)):
        batch_of.together().backward(gradient)
    for ours, want in zip((b.x, *b.parameters), (on_cpu.x, *on_cpu.parameters), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), want.grad, rtol=1e-4, atol=1e-4)
    args = [t.detach() if isinstance(t, Tensor) else t for t in forward_args(b)]
    for index, value, message in (
        (-1, 5, "max_rank: expected the largest rank of 2 adapters with ranks of 12"),
        (-1, 13, "max_rank: expected 0 to 12 for 2 adapters"),
        (-5, args[-5].cpu(), "adapter_of_row: expected on the device of x"),
        (-4, args[-4].long(), "rank_offsets: expected Int"),
        (-3, args[-3][:1], r"scalings: expected shape \[2\]"),
    ):
        wrong = [*args]
        wrong[index] = value
        with pytest.raises(ValueError, match=message):
            OPS.linear_nf4(*wrong)


def experts(counts: list[int], n: int, k: int, dtype: torch.dtype, **options: object) -> ExpertBatch:
    return expert_batch(counts, n, k, dtype=dtype, device="cuda", unassigned=3, **options)


@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.4}, {"dropout_p": 0.4, "seeds": [5, -6, 7, 8]}], ids=str)
@pytest.mark.parametrize(
    ("counts", "n", "k", "dtype", "ranks"),
    [
        ([9, 0, 3, 30], 136, 192, BF16, (4, 0, 16, 40)),
        ([1, 70], 72, 128, FP16, (16, 3, 48, 1)),
        ([5, 0, 12], 37, 102, BF16, (5, 0, 40, 8)),
        ([4, 7], 40, 96, FP32, (5, 0, 40, 16)),
    ],
)
def test_rows_of_experts_have_the_bits_of_their_adapter_alone(
    counts: list[int], n: int, k: int, dtype: torch.dtype, ranks: tuple[int, ...], dropout: dict[str, object]
) -> None:
    experts(counts, n, k, dtype, ranks=ranks, **dropout).check(gradients=not dropout)


def test_rows_of_experts_that_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "gemm")
    experts([9, 0, 30], 136, 192, BF16, ranks=(4, 0, 40), dropout_p=0.4).check(gradients=False)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_adapters_of_experts_that_the_host_cannot_check(dtype: torch.dtype) -> None:
    """Values that are not finite stay with their expert's adapter, and invalid numbers give NaN. Nothing leaves the
    stacks, which the simulator checks."""
    b = experts([6, 0, 11], 40, 64, dtype, ranks=(4, 8))
    dy, expert = b.dy(), torch.tensor([0] * 6 + [2] * 11 + [-1] * 3, device="cuda")
    clean = b.run(""), b.run("_dx", dy=dy)
    b.lora_a[1][2, 3, 5], b.lora_b[1][2, 7, 3] = torch.nan, torch.inf
    hurt = (expert == 2) & (b.of_row == 1)
    assert hurt.any()
    for got, want in zip((b.run(""), b.run("_dx", dy=dy)), clean, strict=True):
        assert torch.equal(got[~hurt], want[~hurt])
        assert not got[hurt].isfinite().all()
    b.of_row[1], b.of_row[-1] = 2, -7  # no such adapters; the last row has no expert either
    for t in b.run("_with_h"):
        assert torch.equal(t.isnan().all(1), torch.arange(len(t), device="cuda") == 1)
        assert not t[-3:].any()
    for offsets in ([2**40, -3, 5], [-(2**62), 9, 4]):
        wrong = torch.tensor(offsets, device="cuda")
        for name in ("", "_dx", "_dlora"):
            getattr(OPS, b.operator + name)(**{**b.arguments(name, dy=dy), "offsets": wrong})


def test_gradients_of_adapters_of_experts() -> None:
    """Of an adapter in an expert, only that one's rows count; without rows, they are zeros."""
    b = experts([6, 0, 11], 40, 64, BF16, ranks=(4, 8), dropout_p=0.3)
    da, db = b.run("_dlora", dy=b.dy())
    assert not da[1].any()
    assert not db[1].any()
    assert da[0].any()
    dy = torch.where((b.of_row == 1)[:, None], torch.nan, b.dy())
    da_of_0, db_of_0 = b.run("_dlora", dy=dy)
    assert torch.equal(da_of_0[:, :4], da[:, :4])
    assert torch.equal(db_of_0[..., :4], db[..., :4])
    none = experts([0, 0], 40, 64, BF16, ranks=(4, 8))
    none = dataclasses.replace(none, g=dataclasses.replace(none.g, x=none.x[:0]), of_row=none.of_row[:0])
    assert not any(t.any() for t in none.run("_dlora", dy=none.dy()))
    assert none.run("").shape == (0, 40)
