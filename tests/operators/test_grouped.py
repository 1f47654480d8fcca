"""The operators over experts on CPU and CUDA, compared with the oracle and with a loop over single weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accuracy import assert_accurate
from grouped_samples import KINDS, OPS, SKEWED, GroupedSample, grouped_sample
from qlora_ext.weight import operands
from samples import DEVICES, DTYPES

every_device = pytest.mark.parametrize("device", DEVICES)

# (n, k): a shape for tensor cores, with a tail of rows and several stages per sum; and shapes that they do not take.
REGULAR, RAGGED = [(136, 192)], [(39, 101), (7, 96)]


def check(s: GroupedSample) -> None:
    """Computes forward, dX and LoRA's gradients twice, and checks that the bits are the same."""
    y, dy = s.forward(), s.dy()
    assert y.dtype == s.x.dtype
    assert torch.equal(y[s.unassigned()], torch.zeros_like(y[s.unassigned()]))
    assert_accurate(y[: s.unassigned().start], s.forward_accuracy())
    assert torch.equal(y, s.forward())

    dx = s.dx(dy)
    assert torch.equal(dx[s.unassigned()], torch.zeros_like(dx[s.unassigned()]))
    assert_accurate(dx[: s.unassigned().start], s.dx_accuracy(dy))
    assert torch.equal(dx, s.dx(dy))

    if s.lora_a is None:
        return
    da, db = s.dlora(dy)
    assert (da.shape, db.shape) == (s.lora_a.shape, s.lora_b.shape)
    s.check_dlora((da, db), dy)
    assert all(map(torch.equal, (da, db), s.dlora(dy)))


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), REGULAR + RAGGED)
def test_shapes(n: int, k: int, dtype: torch.dtype, device: str) -> None:
    check(grouped_sample(SKEWED[8], n, k, 16, dtype, device, dropout_p=0.3))


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [64, 128])
def test_many_experts(experts: int, dtype: torch.dtype, device: str) -> None:
    check(grouped_sample(SKEWED[experts], 40, 128, 8, dtype, device))


@every_device
@pytest.mark.parametrize("counts", [[1], [0, 0, 5], [6, 0, 0], [0, 0], [7, 9, 0, 64, 65], [300, 200]])
def test_any_rows(counts: list[int], device: str) -> None:
    s = grouped_sample(counts, 24, 64, 4, torch.bfloat16, device)
    if sum(counts):
        check(s)
    else:
        dy = s.dy()
        assert not any(t.any() for t in (s.forward(), s.dx(dy), *s.dlora(dy)))


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 0, 1, 5, 32, 72])
@pytest.mark.parametrize(("n", "k"), [(72, 128), (71, 95)])
def test_any_rank(n: int, k: int, rank: int | None, dtype: torch.dtype, device: str) -> None:
    check(grouped_sample([0, 20, 1, 0, 9], n, k, rank, dtype, device, bias=rank is None, dropout_p=0.3))


@every_device
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("block_size", "k"), [(32, 320), (64, 320), (256, 320), (4096, 323)])
def test_block_sizes(block_size: int, k: int, double_quant: bool, device: str) -> None:
    counts = [4, 0, 11]
    check(grouped_sample(counts, 40, k, 4, torch.bfloat16, device, block_size=block_size, double_quant=double_quant))


@every_device
@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("k", [128, 67])  # an expert's first element in the middle of the elements of one random draw
def test_dropout_goes_by_the_element_of_all_of_x(k: int, p: float, device: str) -> None:
    check(grouped_sample([5, 0, 3, 70], 40, k, 8, torch.float32, device, dropout_p=p))


@every_device
def test_empty(device: str) -> None:
    for counts, unassigned in (([0, 0, 0], 0), ([], 5)):
        s = grouped_sample([0], 24, 64, 4, torch.bfloat16, device, unassigned=unassigned)
        stack = slice(0, len(counts))
        packed = tuple(t[stack] if isinstance(t, Tensor) else t for t in operands(s.stack, s.weights[0])[:6])
        a, b = (torch.cat([t] * 3)[: len(counts)] for t in (s.lora_a, s.lora_b))
        if counts:
            packed = tuple(torch.cat([t] * 3) if isinstance(t, Tensor) else t for t in packed)
        offsets = torch.tensor(counts, dtype=torch.int64, device=device)
        y = OPS.grouped_linear_nf4(s.x, offsets, *packed, s.n, None, a, b, 0.5)
        dx = OPS.grouped_linear_nf4_dx(s.dy(), offsets, *packed, s.k, a, b, 0.5)
        da, db = OPS.grouped_linear_nf4_dlora(s.dy(), s.x, offsets, a, b, 0.5)
        assert (y.shape, dx.shape, da.shape, db.shape) == ((unassigned, 24), (unassigned, 64), a.shape, b.shape)
        assert not any(t.any() for t in (y, dx, da, db))


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_arguments_give_the_same_bits(kind: str, dtype: torch.dtype, device: str) -> None:
    s = KINDS[kind](6, 40, 128, dtype=dtype, device=device, dropout_p=0.5)
    dy = s.dy()
    expected = s.forward(), s.dx(dy), *s.dlora(dy)
    s.x, dy = (t.t().contiguous().t() for t in (s.x, dy))
    s.lora_a = s.lora_a.mT.contiguous().mT
    s.lora_b = torch.stack([s.lora_b, s.lora_b], -1)[..., 0]
    if kind == "linear":  # the bias of experts is read row by row, and must be contiguous
        s.bias = torch.stack([s.bias, s.bias], -1)[..., 0]
    else:
        s.offsets = torch.stack([s.offsets, s.offsets], 1)[:, 0]
    assert not any(t.is_contiguous() for t in (s.x, dy, s.lora_a, s.lora_b))
    assert all(map(torch.equal, expected, (s.forward(), s.dx(dy), *s.dlora(dy))))


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_tensors(dtype: torch.dtype, device: str) -> None:
    """Contiguous views that are not aligned to 16 bytes."""
    s = grouped_sample([3, 0, 14], 40, 128, 4, dtype, device)
    for name in ("x", "bias", "lora_a", "lora_b"):
        t = getattr(s, name)
        moved = torch.empty(t.numel() + 1, dtype=dtype, device=device)[1:].view_as(t).copy_(t)
        assert moved.data_ptr() % 16 != 0
        setattr(s, name, moved)
    check(s)


@every_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_dropout_it_is_the_loop(dtype: torch.dtype, device: str) -> None:
    """Bit for bit, except CUDA's forward, which computes h within the sum for few tokens.

    The sums are too short for CUDA to split (n is at most 64), and no expert has enough tokens for Hopper's kernels. On
    a T4, the library multiplies dX of more than 16 tokens, but not that of experts.
    """
    library = device == "cuda" and dtype == torch.float16 and torch.cuda.get_device_capability() == (7, 5)
    s = grouped_sample([0, 3, 0, 17, 1, 30], 56, 192, 16, dtype, device)
    dy = s.dy()
    y, dx, (da, db) = s.forward(), s.dx(dy), s.dlora(dy)
    for e, rows in s.parts():
        one = s.of_expert(e, s.x[rows])
        if device == "cpu":
            assert torch.equal(y[rows], OPS.linear_nf4(*one.args))
        if not library or len(dy[rows]) <= 16:
            assert torch.equal(dx[rows], OPS.linear_nf4_dx(*one.dx_args(dy[rows])))
        gradients = OPS.linear_nf4_dlora(dy[rows], one.x, *one.lora_args)
        assert all(map(torch.equal, (da[e], db[e]), gradients))


def test_gradcheck_with_dropout() -> None:
    s = grouped_sample([3, 0, 2], 6, 10, 3, torch.float64, dropout_p=0.4, block_size=32)
    leaves = [t.requires_grad_() for t in s.differentiable]

    def run(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        lora = a, b, s.scaling, s.dropout_p, s.seed, None
        return OPS.grouped_linear_nf4(x, s.offsets, *operands(s.stack, s.weights[0], s.n, bias, *lora))

    assert torch.autograd.gradcheck(run, leaves)
