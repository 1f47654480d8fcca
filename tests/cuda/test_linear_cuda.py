"""The linear operators on CUDA have the oracle's results: every kernel, as chosen and forced, for every shape, rank,
type, block size, form and dropout, with the same bits each time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import reference
from cuda_cases import BF16, CAPABILITY, DLORA, DX, F16, F32, FEW, FORWARD, HALF, SM90, Case, case, each
from forms import WIDE_FORMS
from operator_results import RESULTS, call, check_samples
from samples import DTYPES

pytestmark = pytest.mark.cuda

# (m, n, k). Those of the forward are for the tensor cores if k % 64 == 0, with tails of every other size: of 8, 16, 32,
# 64 tokens, of 128 rows, of stages of 128 k. Errors of very few outputs vary by chance, so if n is 1, m is not.
REGULAR = [(1, 200, 192), (7, 129, 320), (8, 128, 128), (60, 1, 128), (16, 72, 448), (31, 259, 64), (33, 130, 192)]
REGULAR += [(63, 56, 320), (64, 136, 64)]
RAGGED = [(5, 7, 33), (40, 131, 101), (3, 50, 1), (60, 1, 257), (9, 66, 700), (33, 65, 96), (1, 129, 8)]
# Those of dX are for the fast path if k % 32 == 0 and n % 8 == 0.
DX_REGULAR = [(1, 64, 256), (7, 72, 96), (16, 200, 288), (31, 520, 64), (63, 136, 320), (64, 1032, 32), (65, 64, 576)]
DX_REGULAR += [(300, 40, 64)]
DX_RAGGED = [(3, 1, 257) if shape == (60, 1, 257) else shape for shape in RAGGED]
CODES = [(3, 129, 320), (8, 40, 128), (16, 72, 448), (31, 70, 64), (64, 136, 64), (9, 66, 700)]
DX_CODES = [(7, 72, 96), (31, 200, 64), (40, 131, 101)]
SMALL = [(1, 64, 96), (16, 40, 72), (65, 136, 320), (300, 64, 8), (19, 33, 67), (3, 1, 1)]


def chosen() -> Iterator[Case]:
    """By the kernel that is chosen."""
    for dtype in DTYPES:
        for op, shapes, codes in ((FORWARD, REGULAR + RAGGED, CODES), (DX, DX_REGULAR + DX_RAGGED, DX_CODES)):
            yield from (case(op, *shape, dtype=dtype) for shape in shapes)
            yield from (case(op, *shape, dtype=dtype, code="shuffled") for shape in codes)
            for rank in (None, 0, 1, 5, 64, 256):
                for shape in ((17, 72, 128 if op == FORWARD else 96), (17, 71, 95)):
                    yield case(op, *shape, rank, dtype, bias=rank is None, dropout_p=0.3)
        yield from (case(DLORA, *shape, dtype=dtype, dropout_p=p) for shape in SMALL for p in (0.0, 0.3))
        yield from (case(DLORA, 37, 72, 67, rank, dtype, dropout_p=0.5) for rank in (1, 3, 20, 32, 64, 256))
    for form in ({"block_size": b, "double_quant": d} for b in reference.BLOCK_SIZES for d in (False, True)):
        for n, k, dtype in ((40, 320, BF16), (39, 323, BF16), (40, 320, F32)):
            yield case(FORWARD, 9, n, k, None, dtype, **form)
            yield case(DX, 9, n, k + 32 if n == 40 else k, None, dtype, **form)
    yield from (case(FORWARD, *shape, dtype=dtype) for shape in ((65, 64, 576), (200, 140, 64)) for dtype in HALF)
    # Above every crossover to the library
    yield from (case(FORWARD, 1100, 24, k, 4, t, dropout_p=0.2) for t, k in ((F32, 64), (BF16, 33), (BF16, 64)))


def every_tile() -> Iterator[Case]:
    """With dropout."""
    for m in (4, 12, 24, 64):
        for p in (0.1, 1.0):
            yield case(FORWARD, m, 136, 320, dropout_p=p)
            yield case(DX, m, 192, 320, dropout_p=p)


def split_sums() -> Iterator[Case]:
    """Sums that are long enough for several CTAs per tile, and for several stages of scales."""
    for m, dtype in ((2, BF16), (12, F16), (64, BF16), (64, F16)):
        yield from (
            case(FORWARD, m, 40, k, r, dtype, again=1, dropout_p=0.5) for r, k in ((None, 2112), (40, 2112), (8, 5184))
        )
        if m != 12:
            yield from (case(DX, m, 2056, 64, rank, dtype, again=1, dropout_p=0.5) for rank in (None, 8))
    yield from (case(DLORA, 2100, 24, 40, 4, dtype, again=1, dropout_p=0.2) for dtype in DTYPES)


def few_tokens() -> Iterator[Case]:
    """The forward for up to 16 tokens, which also computes h: all boundaries of tiles, slices of k and ranks."""
    yield from (case(FORWARD, m, 200, 448, dtype=dtype) for m in range(1, 17) for dtype in HALF)
    yield from (case(FORWARD, m, n, 192, 8) for m in (3, 8, 16) for n in (1, 8, 63, 65, 127, 129))
    # Slices of k end in one segment of a unit, in one of the alternating groups, in a stage, in the last CTA.
    for k in (64, 128, 512, 576, 1024, 1088, 1600, 2112):
        yield from (case(FORWARD, m, 72, k, r, double_quant=k % 128 == 0) for m in (2, 7, 13) for r in (None, 16))
    for rank in (0, 1, 5, 8, 15, 16, 17, 24, 32, 33, 64):
        for m in (1, 6, 16):
            for p in (0.0, 0.3):
                yield from (case(FORWARD, m, 136, 320, rank, t, bias=rank % 2 == 0, dropout_p=p) for t in HALF)
    # More rows than multiprocessors, so that every CTA has several stages
    yield from (case(FORWARD, m, 128 * 140, 640, 4, block_size=128) for m in (4, 16))


def sm75() -> Iterator[Case]:
    """The tensor cores of a T4: tails of tokens, rows and stages, every block size, code and rank, and split sums."""
    yield from (case(FORWARD, *shape, dtype=F16, kernel="sm75", dropout_p=0.1) for shape in REGULAR)
    for form in ({"block_size": b, "double_quant": d} for b in reference.BLOCK_SIZES if b >= 64 for d in (False, True)):
        yield case(FORWARD, 34, 150, 320, None, F16, "sm75", **form)
    yield from (case(FORWARD, 40, 150, 320, 8, F16, "sm75", code="shuffled", double_quant=d) for d in (False, True))
    for form in ("fp4", "awq", "float32 zero points", "made up"):
        yield case(FORWARD, 20, 200, 640, 8, F16, "sm75", 0, form)
    for rank in (None, 0, 1, 5, 12, 64, 130, 256):
        yield case(FORWARD, 40, 72, 1088, rank, F16, "sm75", bias=rank is None, dropout_p=0.3)
    for splits in (1, 3, 9):
        yield case(FORWARD, 70, 264, 2112, 40, F16, f"sm75:splits={splits}", 3, dropout_p=0.5)
    yield case(FORWARD, 33, 130, 5184, 16, F16, "sm75:splits=5", 3, "awq")


def sm90() -> Iterator[Case]:
    """Hopper's kernels: both types in the smallest tile; one type per shape, alternating, in the larger tiles."""
    for op, shapes in SM90.items():
        for i, (shape, (tokens, splits)) in enumerate(shapes.items()):
            kernel = f"sm90:tokens={tokens},splits={splits},multicast=1"
            for dtype in HALF if tokens == 64 else [HALF[i % 2]]:
                yield case(
                    op, *shape, dtype=dtype, kernel=kernel, dropout_p=0.1 * (op == FORWARD or shape[0] in (129, 257))
                )
        for form in (
            {"block_size": b, "double_quant": d} for b in reference.BLOCK_SIZES if b >= 64 for d in (False, True)
        ):
            # Rows of 320 begin in the middle of the larger blocks, and end in the middle of a stage.
            yield case(op, 34, 150 if op == FORWARD else 72, 320, None, kernel="sm90", **form)
        for dtype in HALF:
            yield from (
                case(op, 40, 150 if op == FORWARD else 72, 320, 8, dtype, "sm90", code="shuffled", double_quant=d)
                for d in (False, True)
            )
    for terms, dtype in ((576, BF16), (5184, F16)):
        yield case(FORWARD, 66, 40, terms, 40, dtype, "sm90", again=1, dropout_p=0.5)
    for terms, dtype in ((264, BF16), (2056, F16)):
        yield case(DX, 66, terms, 64, 40, dtype, "sm90", again=1, dropout_p=0.5)


def sm90_ranks() -> Iterator[Case]:
    for op in (FORWARD, DX):
        for rank in (None, 0, 1, 5, 12, 64, 130, 256):
            for n, k in ((72, 128), (72, 1088)) if op == FORWARD else ((72, 192), (1032, 192)):
                yield from (case(op, 40, n, k, rank, t, "sm90", bias=rank is None, dropout_p=0.3) for t in HALF)
    yield case(FORWARD, 257, 5100, 64, 150, kernel="sm90")  # several stages in the large tile


SM100 = {  # shape -> tokens per tile, splits, multicast: tails of tokens and outputs, sums split and not
    FORWARD: {
        (64, 128, 64): (64, 1, 1),
        (33, 56, 128): (64, 2, 1),
        (65, 259, 832): (64, 3, 1),
        (70, 40, 1984): (64, 8, 1),
        (127, 136, 640): (128, 1, 1),
        (200, 1, 192): (128, 3, 1),
        (129, 300, 448): (128, 2, 2),
        (257, 136, 320): (256, 1, 1),
        (130, 260, 704): (256, 2, 1),
        (100, 129, 576): (256, 1, 2),
    },
    DX: {
        (64, 64, 128): (64, 1, 1),
        (33, 136, 64): (64, 2, 1),
        (65, 840, 320): (64, 3, 1),
        (70, 1000, 64): (64, 8, 1),
        (127, 648, 192): (128, 1, 1),
        (200, 8, 320): (128, 1, 2),
        (129, 456, 448): (128, 2, 2),
        (257, 328, 192): (256, 1, 1),
        (130, 712, 320): (256, 2, 1),
    },
}


def sm100() -> Iterator[Case]:
    """Blackwell's kernels: both types in the smallest tile; one type per shape, alternating, in the larger tiles."""
    for op, shapes in SM100.items():
        for i, (shape, (tokens, splits, multicast)) in enumerate(shapes.items()):
            kernel = f"sm100:tokens={tokens},splits={splits},multicast={multicast}"
            dropout_p = 0.1 if op == FORWARD else 0.3 * (shape[0] != 65)  # in dX it masks LoRA's sums first
            for dtype in HALF if tokens == 64 else [HALF[i % 2]]:
                yield case(op, *shape, 16, dtype, kernel, 3, dropout_p=dropout_p)
        rows = 150 if op == FORWARD else 72
        # Rows of 320 begin in the middle of the larger blocks.
        for form in (
            {"block_size": b, "double_quant": d} for b in reference.BLOCK_SIZES if b >= 64 for d in (False, True)
        ):
            yield case(op, 34, rows, 320, None, kernel="sm100", **form)
        for dtype in HALF:
            yield from (
                case(op, 40, rows, 320, 8, dtype, "sm100", code="shuffled", double_quant=d) for d in (False, True)
            )
        for form in ("fp4", "made up", "nf4 alone"):
            yield case(op, 20, 200, 640, 8, BF16, "sm100", 0, form)
        for rank in (None, 0, 1, 5, 12, 64, 130, 256):
            dropout_p = 0.3 * ((op, rank) != (DX, 130))
            n, k = (72, 704) if op == FORWARD else (200, 192)
            yield case(op, 40, n, k, rank, HALF[rank == 5], "sm100", bias=rank is None, dropout_p=dropout_p)
    yield case(FORWARD, 257, 300, 64, 150, kernel="sm100:tokens=256")  # more chunks of ranks than stages
    yield case(DX, 200, 64, 192, 8, kernel="sm100", dropout_p=1.0)


def many_tokens() -> Iterator[Case]:
    """A panel of the weight is decoded, and our own GEMM or a library multiplies by it. The total is rounded once."""
    for op in (FORWARD, DX):
        # Tiles of tokens and columns that are not full, and sums that end within a stage
        yield case(op, 150, 280, 328, 4, F16, "gemm", 1)
        yield case(op, 150, 280, 328, None, BF16, "gemm", 1, bias=False)
        yield case(op, 150, 280, 328, 5, BF16, "gemm", 1, dropout_p=0.3)  # rows of h, g, lora_b begin at any address
        yield case(op, 150, 280, 328, 24, F16, "gemm", 1, dropout_p=1.0)
        yield case(op, 150, 280, 328, 144, F16, "gemm", 1, double_quant=False)  # more stages than are copied ahead
        # One stage and many
        yield from (case(op, *shape, kernel="gemm", again=1, dropout_p=0.2) for shape in ((1, 8, 8), (128, 256, 32)))
        for dtype in DTYPES:
            library = (op, 200, 48, 128)
            yield from (case(*library, r, dtype, "library", 1, bias=b) for r in (4, None) for b in (True, False))
            yield case(*library, 5, dtype, "library", 1, dropout_p=0.3)
            yield case(*library, 4, dtype, "library", 1, dropout_p=1.0)
            yield case(*library, 4, dtype, "library", 1, double_quant=False)
            yield case(*library, 80, dtype, "library", 1)
            yield case(op, (2, 75), 33, 101, 3, dtype, "library", 1, dropout_p=0.2)
            yield from (case(op, 3, n, k, 16, dtype, "library", 1, dropout_p=0.2) for n, k in ((72, 192), (41, 95)))
        # Panels that hold parts of the sums
        yield case(op, 150, 640, 640, 4, F16, "library:splits=3,panel=256", 1, dropout_p=0.2)
        yield case(op, 150, 264, 520, 4, BF16, "library:splits=2" if op == DX else "library:splits=3", 1, dropout_p=0.2)
        yield case(op, 70, 264, 264, None, F32, "library:splits=2", 1, bias=False)
        # Two whole panels and a partial one
        yield case(op, 200, 704, 704, 4, BF16, "library:panel=256", 1, dropout_p=0.2, block_size=128)
    yield case(FORWARD, (2, 20), 37, 72, 3, BF16, "gemm", 1, dropout_p=0.2)  # outputs of any number


def cut_sums() -> Iterator[Case]:
    """Our own GEMM, where tiles would leave SMs idle: sums of 35 stages in 4 parts, the last of which is shorter. LoRA
    and dropout belong to the first part, the bias to the total, and the bits are the same in every order of CTAs."""
    for op, shape in ((FORWARD, (129, 264, 1104)), (DX, (129, 1104, 264))):
        yield case(op, *shape, 40, BF16, "gemm", 3, dropout_p=0.2)
        yield case(op, *shape, 5, F16, "gemm:ctas=3", 3, double_quant=False)
        yield case(op, *shape, None, BF16, "gemm:ctas=7,panel=256", 3, bias=False)


def forced() -> Iterator[Case]:
    """Every kernel of an operator, with every tile that it was compiled for and with sums split otherwise than it would
    choose."""
    for kernels, op in (
        ((f"few_tokens:tokens={FEW},splits=2", "few_tokens"), FORWARD),
        (("tensor_cores", "tensor_cores:splits=3", "ragged", "ragged:tokens=4", "ragged:tokens=64"), FORWARD),
        (("exact", "exact:tokens=64", "gemm", "library"), FORWARD),
        (("tensor_cores", "tensor_cores:tokens=8", "tensor_cores:tokens=64,splits=3", "ragged"), DX),
        (("ragged:tokens=16,splits=2", "exact:splits=3", "gemm:panel=1024", "library"), DX),
        (("sm90", "sm90:tokens=128,splits=2", "sm90:splits=4"), FORWARD),
        (("sm90",), DX),
        (("sm100", "sm100:tokens=128,splits=2", "sm100:tokens=256,splits=4"), FORWARD),
        (("sm100", "sm100:tokens=256,splits=2"), DX),
    ):
        for kernel in kernels:
            m = min(11, FEW) if kernel.startswith("few_tokens") else 11
            dtype = F32 if kernel.startswith("exact") else BF16
            yield case(op, m, 136, 2048, dtype=dtype, kernel=kernel, dropout_p=0.2)


def wide_codes() -> Iterator[Case]:
    """Of every form: the kernels without tensor cores, with each of their tiles, splits, tails of rows and tokens; and
    decoded panels, of which some have further rows or columns."""
    for op, generic in ((FORWARD, "ragged"), (DX, "exact")):
        for form in WIDE_FORMS:
            for m, n, k in ((3, 200, 384), (14, 33, 256), (40, 72, 640)):
                yield case(op, m, n, k, 5, BF16, generic if m < 17 else "", 0, form, dropout_p=0.2)
            yield case(op, 40, 72, 256, 16, F16, "exact" if CAPABILITY == (7, 5) else "gemm", 0, form)
            yield case(op, 7, 1032, 128, 8, F32, "exact", 1, form, dropout_p=0.2)
            yield case(op, 33, 136, 128, None, F32, "library", 0, form, bias=False)
        yield case(op, 40, 328, 640, 8, BF16, "library:panel=256", 0, "q6_k")
        yield case(op, 20, 72, 384, 8, BF16, f"{generic}:{'tokens=64' if op == FORWARD else 'splits=2'}", 1, "q5_k")


def streams() -> Iterator[Case]:
    """CTAs take equal runs of the segments of all tiles (stream-K). A tile has 128 rows, a segment 64 k, and a run a
    multiple of 4 segments. LoRA and bias are added once per tile, and the bits are the same in every order of the
    CTAs: the simulator shuffles them by its seed, a card by chance."""
    # 4 tiles of 10 segments in runs of 20, which end with a tile
    yield case(FORWARD, 1, 389, 640, 16, BF16, "few_tokens:ctas=2", 3)
    # runs of 12: over one border, and a last one of 4
    yield case(FORWARD, 3, 389, 640, 8, BF16, "few_tokens:ctas=4", 3, dropout_p=0.2)
    # runs of 28: over two borders. h has a launch of its own
    yield case(FORWARD, 5, 630, 640, 33, F16, "few_tokens:ctas=2", 3)
    # runs of 4, tiles of 9: odd parts
    yield case(FORWARD, 16, 257, 576, 16, BF16, "few_tokens:ctas=7", 3, "fp4", bias=False)
    # one tile of 17: no border
    yield case(FORWARD, 8, 100, 1088, 32, F16, "few_tokens:ctas=3", 3, "made up")
    yield case(FORWARD, 17, 389, 640, 16, F16, "tensor_cores:ctas=4", 3)
    # on two tiles of tokens
    yield case(FORWARD, 33, 257, 576, 40, BF16, "tensor_cores:tokens=32,ctas=7", 3, "nf4 alone", bias=False)


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CUDA_KERNEL", case.kernel)
    first = check_samples(RESULTS[case.op], case.sample, entries=250)
    assert all(t.is_cuda and t.dtype == case.dtype for t in first)
    for seed in range(case.again):
        if "CUDASIM_TORCH_LIBRARY" in os.environ:
            monkeypatch.setenv("CUDASIM_SEED", str(seed))
        assert all(map(torch.equal, call(case.op, *case.sample()), first))


@each(chosen())
def test_the_choice(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(every_tile())
def test_dropout_in_every_tile(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(split_sums())
def test_split_sums(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(few_tokens())
def test_few_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(sm75())
def test_sm75(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(sm90())
def test_sm90(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(sm90_ranks())
def test_ranks_of_sm90(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(sm100())
def test_sm100(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(many_tokens())
def test_many_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(cut_sums())
def test_cut_sums(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(wide_codes())
def test_wide_codes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@each(forced())
def test_forced(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@pytest.mark.skipif(CAPABILITY[0] >= 10, reason="from compute capability 10.0 on, no kernel takes streams")
@each(streams())
def test_streams(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)
