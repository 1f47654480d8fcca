"""Which kernel each linear operator runs with on which card, and what QLORA_CUDA_KERNEL makes of it: plain C++
(cuda/tuning), which needs no card."""

from __future__ import annotations

import pathlib

import pytest

from cuda_cases import DLORA, DX, FORWARD, SM90
from host_programs import built, needs_compiler, printed_by
from qlora_ext import _C, formats

CARDS = ("sm80", "sm90", "sm100", "sm120")  # A100, H100, B200, RTX 5090
RANK = 16
NO_BFLOAT16 = "bfloat16 needs compute capability 8.0 or newer, and this device has 7.5: compute in float16 or float32"

# (operator, dtype, m, n, k, block size, experts; 0: a single weight) -> the choice on each of CARDS, or on all. Splits
# that a launcher chooses, by what the card holds of the compiled kernel, are not part of it.
CHOICES = {
    # few tokens and many, of regular shape
    (FORWARD, "bfloat16", 1, 4096, 4096, 64, 0): "few_tokens tokens=4 rows=128",
    (FORWARD, "float16", 16, 4096, 4096, 64, 0): (
        "few_tokens tokens=16 rows=128",
        "few_tokens tokens=16 rows=128",
        "tensor_cores tokens=16 rows=128",
        "tensor_cores tokens=16 rows=128",
    ),
    (FORWARD, "bfloat16", 17, 4096, 4096, 64, 0): (
        "tensor_cores tokens=32 rows=128",
        "tensor_cores tokens=32 rows=128",
        "sm100 tokens=64 rows=128 splits=4 multicast=1",
        "tensor_cores tokens=32 rows=128",
    ),
    (FORWARD, "bfloat16", 64, 4096, 4096, 64, 0): (
        "tensor_cores tokens=64 rows=128",
        "sm90 tokens=64 rows=128 splits=3 multicast=1",
        "sm100 tokens=64 rows=128 splits=4 multicast=1",
        "tensor_cores tokens=32 rows=128",
    ),
    (FORWARD, "bfloat16", 4096, 4096, 4096, 64, 0): (
        "gemm splits=1 panel=2560",  # 320 tiles and 192, in 5 waves
        "sm90 tokens=128 rows=128 splits=1 multicast=2",
        "library splits=1 panel=4096",
        "gemm splits=3 panel=4096",  # of 512 tiles, 480 whole on 170 SMs, and 32 in parts
    ),
    # clusters that fit the card's GPCs; panels that leave L2, where smaller ones would leave SMs idle
    (FORWARD, "bfloat16", 256, 4096, 4096, 64, 0): (
        "gemm splits=3 panel=4096",  # 32 tiles on 108 SMs
        "sm90 tokens=128 rows=128 splits=2 multicast=1",
        "sm100 tokens=256 rows=128 splits=4 multicast=1",
        "tensor_cores tokens=32 rows=128",
    ),
    (FORWARD, "bfloat16", 192, 11008, 4096, 64, 0): (
        "gemm splits=1 panel=11008",
        "sm90 tokens=64 rows=128 splits=1 multicast=2",
        "sm100 tokens=256 rows=128 splits=3 multicast=1",
        "tensor_cores tokens=32 rows=128",
    ),
    (DX, "bfloat16", 4096, 14336, 4096, 64, 0): (
        "gemm splits=1 panel=4096",
        "sm90 tokens=256 columns=128 splits=1 multicast=2",
        "library splits=1 panel=4096",
        "gemm splits=4 panel=1280",
    ),
    # long sums, which B200 splits
    (FORWARD, "bfloat16", 64, 4096, 14336, 64, 0): (
        "tensor_cores tokens=64 rows=128",
        "sm90 tokens=64 rows=128 splits=7 multicast=1",
        "sm100 tokens=64 rows=128 splits=4 multicast=1",
        "tensor_cores tokens=32 rows=128",
    ),
    (FORWARD, "bfloat16", 256, 4096, 14336, 64, 0): (
        "gemm splits=3 panel=4096",
        "sm90 tokens=128 rows=128 splits=2 multicast=1",
        "sm100 tokens=256 rows=128 splits=4 multicast=1",
        "tensor_cores tokens=32 rows=128",
    ),
    (DX, "bfloat16", 256, 14336, 4096, 64, 0): (
        "gemm splits=3 panel=4096",
        "sm90 tokens=256 columns=128 splits=3 multicast=1",
        "sm100 tokens=256 columns=128 splits=4 multicast=1",
        "tensor_cores tokens=64 columns=256",
    ),
    # our own GEMM, where its tiles and the parts of sums that are cut fill the card
    (FORWARD, "bfloat16", 512, 4096, 4096, 64, 0): (
        "gemm splits=3 panel=2048",
        "sm90 tokens=128 rows=128 splits=1 multicast=2",
        "library splits=1 panel=4096",
        "tensor_cores tokens=32 rows=128",
    ),
    (DX, "bfloat16", 1024, 4096, 4096, 64, 0): (
        "gemm splits=4 panel=4096",  # 104 whole tiles, and 24 in 4 parts
        "sm90 tokens=256 columns=128 splits=1 multicast=2",
        "library splits=1 panel=4096",
        "tensor_cores tokens=64 columns=256",
    ),
    (FORWARD, "float16", 4096, 14336, 4096, 64, 0): (
        "gemm splits=1 panel=2560",
        "sm90 tokens=128 rows=128 splits=1 multicast=2",
        "library splits=1 panel=7424",
        "gemm splits=1 panel=5376",
    ),
    # k that is no multiple of 64, and blocks of 32
    (FORWARD, "bfloat16", 4, 4096, 4100, 64, 0): "ragged tokens=4 rows=64",
    (FORWARD, "bfloat16", 32, 4096, 4096, 32, 0): "ragged tokens=64 rows=64",
    (FORWARD, "bfloat16", 300, 4096, 4100, 64, 0): (
        "library splits=1 panel=2048",
        "library splits=1 panel=2048",
        "library splits=1 panel=4096",
        "library splits=1 panel=4096",
    ),
    (FORWARD, "bfloat16", 4096, 4096, 4104, 64, 0): (
        "gemm splits=1 panel=4096",  # leaves L2, in which panels of 2048 take another wave
        "library splits=1 panel=1024",
        "library splits=1 panel=4096",
        "gemm splits=3 panel=4096",
    ),
    # exact float32
    (FORWARD, "float32", 4, 4096, 4096, 64, 0): "exact tokens=4 rows=64",
    (FORWARD, "float32", 64, 4096, 4096, 64, 0): "exact tokens=64 rows=64",
    (FORWARD, "float32", 65, 4096, 4096, 64, 0): "library splits=1 panel=4096",  # smaller ones would leave SMs idle
    # the input's gradient
    (DX, "bfloat16", 1, 4096, 4096, 64, 0): "tensor_cores tokens=8 columns=256",
    (DX, "bfloat16", 64, 4096, 4096, 64, 0): (
        "tensor_cores tokens=64 columns=256",
        "sm90 tokens=64 columns=128 splits=3 multicast=1",
        "sm100 tokens=64 columns=128 splits=4 multicast=1",
        "tensor_cores tokens=64 columns=256",
    ),
    (DX, "bfloat16", 4096, 4096, 4096, 64, 0): (
        "gemm splits=1 panel=2560",
        "sm90 tokens=256 columns=128 splits=1 multicast=2",
        "library splits=1 panel=4096",
        "gemm splits=3 panel=4096",
    ),
    (DX, "bfloat16", 40, 4100, 4096, 64, 0): "ragged tokens=32 columns=256",
    (DX, "bfloat16", 4, 4096, 4096, 16, 0): "ragged tokens=16 columns=256",
    (DX, "float32", 4, 4096, 4096, 64, 0): "exact tokens=16 columns=128",
    # the gradients of LoRA's weights
    (DLORA, "bfloat16", 4096, 4096, 4096, 64, 0): "tensor_cores ranks=16 columns=64",
    (DLORA, "bfloat16", 64, 4100, 4096, 64, 0): "ragged ranks=16 columns=64",
    (DLORA, "float32", 64, 4096, 4096, 64, 0): "exact ranks=16 columns=64",
    # experts
    (FORWARD, "bfloat16", 64, 4096, 4096, 64, 64): "tensor_cores tokens=8 rows=128",
    (FORWARD, "bfloat16", 4096, 4096, 4096, 64, 8): (
        "tensor_cores tokens=64 rows=128",
        "sm90 tokens=128 rows=128 splits=1 multicast=2",
        "gemm panel=2048",
        "tensor_cores tokens=32 rows=128",
    ),
    # Experts whose weights are decoded once: where panels, which leave L2, cost less than decoding in every tile, or
    # than products without tensor cores
    (FORWARD, "bfloat16", 8192, 14336, 4096, 64, 8): (
        "gemm panel=1536",
        "sm90 tokens=128 rows=128 splits=1 multicast=2",
        "gemm panel=512",
        "tensor_cores tokens=32 rows=128",
    ),
    (DX, "float16", 8192, 14336, 4096, 64, 8): (
        "tensor_cores tokens=64 columns=256",
        "sm90 tokens=256 columns=128 splits=1 multicast=2",
        "gemm panel=512",
        "tensor_cores tokens=64 columns=256",
    ),
    (FORWARD, "bfloat16", 16384, 1536, 2048, 32, 128): "gemm panel=256",
    (FORWARD, "bfloat16", 131072, 768, 2048, 64, 128): (
        "gemm panel=256",
        "sm90 tokens=128 rows=128 splits=1 multicast=2",
        "gemm panel=256",
        "tensor_cores tokens=32 rows=128",
    ),
    (FORWARD, "bfloat16", 16384, 4096, 7168, 32, 256): "ragged tokens=64 rows=64",  # panels of 900 MiB
    (FORWARD, "float16", 64, 4096, 4100, 64, 64): "ragged tokens=16 rows=64",
    (FORWARD, "float32", 4096, 4096, 4096, 64, 8): "exact tokens=64 rows=64",
    (DX, "bfloat16", 64, 4096, 4096, 64, 8): "tensor_cores tokens=16 columns=256",
    (DX, "bfloat16", 4096, 4096, 4096, 64, 8): (
        "tensor_cores tokens=64 columns=256",
        "sm90 tokens=256 columns=128 splits=1 multicast=2",
        "gemm panel=2048",
        "tensor_cores tokens=64 columns=256",
    ),
    (DLORA, "float32", 64, 4096, 4096, 64, 8): "exact ranks=16 columns=64",
}

# On a T4: the forward on its tensor cores, the kernels without tensor cores, and the library.
ON_T4 = {
    (FORWARD, "float16", 4, 4096, 4096, 64, 0): "exact tokens=4 rows=64",
    (FORWARD, "float16", 5, 4096, 4096, 64, 0): "sm75 tokens=32 rows=128",
    (FORWARD, "float16", 511, 4096, 4096, 64, 0): "sm75 tokens=32 rows=128",
    (FORWARD, "float16", 512, 4096, 4096, 64, 0): "library splits=1 panel=3584",
    (FORWARD, "float16", 16, 4096, 4100, 32, 0): "exact tokens=16 rows=64",
    (FORWARD, "float16", 17, 4096, 4100, 32, 0): "library splits=1 panel=4096",
    (FORWARD, "float16", 4096, 14336, 4096, 64, 0): "library splits=1 panel=5120",
    (FORWARD, "float32", 64, 4096, 4096, 64, 0): "exact tokens=64 rows=64",
    (FORWARD, "float32", 65, 4096, 4096, 64, 0): "library splits=1 panel=4096",
    (DX, "float16", 16, 4096, 4096, 64, 0): "exact tokens=16 columns=128",
    (DX, "float16", 17, 4100, 4096, 16, 0): "library splits=1 panel=4096",
    (DX, "float32", 16, 4096, 4096, 64, 0): "exact tokens=16 columns=128",
    (DLORA, "float16", 4096, 4096, 4096, 64, 0): "exact ranks=16 columns=64",
    (FORWARD, "float16", 4096, 4096, 4096, 64, 8): "exact tokens=64 rows=64",
    (DX, "float16", 4096, 4096, 4096, 64, 8): "exact tokens=16 columns=128",
    (DLORA, "float16", 4096, 4096, 4096, 64, 8): "exact ranks=16 columns=64",
    **{
        (operator, "bfloat16", 64, 4096, 4096, 64, experts): NO_BFLOAT16
        for operator in (FORWARD, DX, DLORA)
        for experts in (0, 8)
    },
}

# (card, operator, m, k, experts, what QLORA_CUDA_KERNEL says) -> the choice, of bfloat16.
FORCED = {
    ("sm90", FORWARD, 64, 4096, 0, "tensor_cores"): "tensor_cores tokens=64 rows=128",
    ("sm90", FORWARD, 64, 4096, 0, "sm90:tokens=128,splits=2"): "sm90 tokens=128 rows=128 splits=2 multicast=1",
    ("sm90", FORWARD, 64, 4096, 0, "sm90:splits=3"): "sm90 tokens=64 rows=128 splits=3 multicast=1",
    ("sm90", FORWARD, 512, 4096, 0, "sm90:multicast=1"): "sm90 tokens=128 rows=128 splits=1 multicast=1",
    ("sm90", DX, 64, 4096, 0, "sm90:splits=4,multicast=2"): "sm90 tokens=64 columns=128 splits=4 multicast=2",
    ("sm90", FORWARD, 3, 4096, 0, "sm90"): "sm90 tokens=64 rows=128 splits=3 multicast=1",
    ("sm90", FORWARD, 3, 4096, 0, "few_tokens:tokens=16"): "few_tokens tokens=16 rows=128",
    ("sm80", FORWARD, 3, 4096, 0, "few_tokens:ctas=7"): "few_tokens tokens=4 rows=128 ctas=7",
    ("sm90", FORWARD, 64, 4096, 0, "tensor_cores:tokens=32,ctas=7"): "tensor_cores tokens=32 rows=128 ctas=7",
    ("sm90", FORWARD, 3, 4096, 0, "ragged:tokens=64"): "ragged tokens=64 rows=64",
    ("sm80", FORWARD, 3, 4096, 0, "library:panel=512"): "library splits=1 panel=512",
    ("sm80", FORWARD, 3, 4096, 0, "library:splits=3,panel=512"): "library splits=3 panel=512",
    ("sm80", FORWARD, 3, 4096, 0, "gemm:panel=512"): "gemm splits=6 panel=512",
    ("sm120", FORWARD, 3, 4096, 0, "gemm:panel=512,ctas=7"): "gemm splits=7 ctas=7 panel=512",
    ("sm80", DX, 3, 4096, 0, "tensor_cores:tokens=32,splits=5"): "tensor_cores tokens=32 columns=256 splits=5",
    ("sm80", DLORA, 3, 4096, 0, "ragged:ranks=64"): "ragged ranks=64 columns=64",
    ("sm80", FORWARD, 3, 4096, 8, "tensor_cores:tokens=16"): "tensor_cores tokens=16 rows=128",
    ("sm90", DX, 3, 4096, 8, "gemm:panel=512"): "gemm panel=512",
    ("sm90", FORWARD, 3, 4096, 8, "sm90:tokens=128,multicast=1"): "sm90 tokens=128 rows=128 splits=1 multicast=1",
    ("sm100", FORWARD, 3, 4096, 0, "sm100"): "sm100 tokens=64 rows=128 splits=4 multicast=1",
    ("sm100", FORWARD, 64, 4096, 0, "sm100:tokens=256,splits=2"): "sm100 tokens=256 rows=128 splits=2 multicast=1",
    ("sm100", DX, 3, 4096, 0, "sm100:tokens=128"): "sm100 tokens=128 columns=128 splits=4 multicast=1",
    ("sm100", FORWARD, 64, 4096, 0, "sm100:multicast=2"): "sm100 tokens=64 rows=128 splits=4 multicast=2",
    ("sm100", FORWARD, 64, 4096, 0, "library"): "library splits=1 panel=4096",
    # panels that hold parts of the sums, so that they stay in L2 with columns for all SMs
    ("sm100", FORWARD, 256, 14336, 0, "library"): "library splits=2 panel=4096",
}

NAMES = "few_tokens, tensor_cores, sm75, sm90, sm100, ragged, exact, gemm or library"
REFUSED = {
    ("sm90", FORWARD, 3, 4096, 0, "fused"): f"expected NAME or NAME:KEY=NUMBER,... with the name {NAMES}, got fused",
    ("sm90", FORWARD, 3, 4096, 0, ":tokens=4"): f"with the name {NAMES}, got :tokens=4",
    ("sm80", FORWARD, 64, 4096, 0, "sm90"): (
        "sm90 does not take linear_nf4 of m=64 n=4096 k=4096 rank=16 bfloat16 on compute capability 8.0: "
        "expected gemm, library, tensor_cores or ragged"
    ),
    ("sm90", FORWARD, 17, 4096, 0, "few_tokens"): "few_tokens does not take linear_nf4 of m=17",
    ("sm90", FORWARD, 64, 4100, 0, "sm90"): "sm90 does not take linear_nf4 of m=64 n=4096 k=4100",
    ("sm90", FORWARD, 64, 4096, 0, "exact"): "exact does not take linear_nf4",
    ("sm80", FORWARD, 64, 4100, 0, "gemm"): "gemm does not take linear_nf4 of m=64 n=4096 k=4100",
    ("sm90", DLORA, 64, 4096, 0, "library"): "library does not take linear_nf4_dlora of m=64",
    ("sm80", FORWARD, 64, 4096, 8, "sm90"): "sm90 does not take linear_nf4 of experts=8 m=64",
    ("sm90", FORWARD, 64, 4096, 8, "sm90:splits=2"): "with the key tokens or multicast, got splits=2",
    ("sm90", FORWARD, 64, 4096, 0, "sm90:"): (
        "expected KEY=NUMBER after sm90:, with the key tokens, splits or multicast, got "
    ),
    ("sm90", FORWARD, 64, 4096, 0, "sm90:rows=128"): "with the key tokens, splits or multicast, got rows=128",
    ("sm90", FORWARD, 64, 4096, 0, "sm90:tokens"): "with the key tokens, splits or multicast, got tokens",
    ("sm90", FORWARD, 64, 4096, 8, "exact:tokens=4"): "exact does not take",
    ("sm90", FORWARD, 64, 4096, 0, "sm90:tokens=x"): "expected tokens=NUMBER, from 1 to 2147483647, got tokens=x",
    ("sm90", FORWARD, 64, 4096, 0, "sm90:splits=0"): "expected splits=NUMBER, from 1 to 2147483647, got splits=0",
    ("sm90", DX, 64, 4096, 0, "exact:splits=2"): "exact does not take linear_nf4_dx",
    ("sm90", DX, 64, 4096, 0, "tensor_cores:ctas=2"): "with the key tokens or splits, got ctas=2",
    ("sm80", FORWARD, 64, 4096, 0, "tensor_cores:ctas=2"): "tensor_cores cannot run linear_nf4 of m=64",
    ("sm100", FORWARD, 3, 4096, 0, "few_tokens:ctas=2"): "few_tokens cannot run linear_nf4 of m=3",
    ("sm90", DX, 64, 4096, 0, "ragged:splits=2147483648"): "from 1 to 2147483647, got splits=2147483648",
    ("sm90", FORWARD, 64, 4096, 0, "sm90:tokens=32"): "expected tokens=64 or 128 of sm90 for linear_nf4, got 32",
    ("sm90", DX, 64, 4096, 0, "sm90:tokens=32"): "expected tokens=64, 128 or 256 of sm90 for linear_nf4_dx, got 32",
    ("sm90", DX, 64, 4096, 0, "sm90:multicast=3"): "expected multicast=1 or 2 of sm90 for linear_nf4_dx, got 3",
    ("sm90", DX, 64, 4096, 0, "sm90:splits=5,multicast=2"): "sm90 cannot run linear_nf4_dx of m=64",
    ("sm90", FORWARD, 64, 128, 0, "sm90:splits=2"): "sm90 cannot run linear_nf4 of m=64 n=4096 k=128",
    ("sm90", FORWARD, 9, 4096, 0, "few_tokens:tokens=8"): "with tokens=8: expected tokens=16",
    ("sm120", FORWARD, 64, 4096, 0, "tensor_cores:tokens=64"): "with tokens=64: expected tokens=32",
    ("sm120", FORWARD, 3, 4096, 0, "few_tokens:tokens=16"): "with tokens=16: expected tokens=8",
    ("sm120", FORWARD, 9, 4096, 0, "few_tokens"): "few_tokens does not take linear_nf4 of m=9",
    ("sm90", FORWARD, 64, 4096, 0, "sm100"): "sm100 does not take linear_nf4 of m=64",
    ("sm120", FORWARD, 64, 4096, 0, "sm100"): "sm100 does not take linear_nf4 of m=64",
    ("sm100", FORWARD, 64, 4100, 0, "sm100"): "sm100 does not take linear_nf4 of m=64 n=4096 k=4100",
    ("sm100", FORWARD, 64, 4096, 8, "sm100"): "sm100 does not take linear_nf4 of experts=8",
    ("sm100", DX, 64, 4096, 8, "sm100"): "sm100 does not take linear_nf4_dx of experts=8",
    ("sm100", DLORA, 64, 4096, 0, "sm100"): "sm100 does not take linear_nf4_dlora of m=64",
    (
        "sm100",
        FORWARD,
        64,
        4096,
        0,
        "sm100:tokens=32",
    ): "expected tokens=64, 128 or 256 of sm100 for linear_nf4, got 32",
    ("sm100", FORWARD, 64, 128, 0, "sm100:splits=4"): "sm100 cannot run linear_nf4 of m=64 n=4096 k=128",
    ("sm80", FORWARD, 64, 4096, 0, "gemm:splits=2"): "with the key ctas or panel, got splits=2",
    ("sm80", FORWARD, 64, 4096, 0, "library:splits=7"): "with splits=7: expected splits=6",
    ("sm80", FORWARD, 64, 4096, 0, "library:panel=300"): "with panel=300: expected panel=512",
}


def line(card: str, op: str, dtype: str, m: int, n: int, k: int, block: int, experts: int, forced: str) -> str:
    return f"{card} {op} {dtype} {m} {n} {k} {block} {RANK} {experts} {forced}\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return built("tests/cuda/print_choices.cpp", tmp_path_factory.mktemp("choices"))


@needs_compiler
def test_the_choice_on_each_card(program: pathlib.Path) -> None:
    lines = [line(card, *problem, "-") for problem in CHOICES for card in CARDS]
    found = iter(printed_by(program, "".join(lines)))
    for problem, expected in CHOICES.items():
        choices = tuple(next(found) for _ in CARDS)
        assert choices == (expected if isinstance(expected, tuple) else (expected,) * len(CARDS)), problem


@needs_compiler
def test_shapes_of_hoppers_kernels_are_its_choice(program: pathlib.Path) -> None:
    width = {FORWARD: "rows", DX: "columns"}
    expected = {
        (op, *shape): f"sm90 tokens={tokens} {width[op]}=128 splits={splits} multicast=1"
        for op, shapes in SM90.items()
        for shape, (tokens, splits) in shapes.items()
    } | {(DX, 64, 72, 96): "tensor_cores tokens=64 columns=256"}
    lines = [line("sm90", op, "bfloat16", *shape, 64, 0, "-") for op, *shape in expected]
    found = printed_by(program, "".join(lines))
    assert dict(zip(expected, found, strict=True)) == expected


@needs_compiler
def test_the_choice_on_a_t4(program: pathlib.Path) -> None:
    lines = [line("sm75", *problem, "-") for problem in ON_T4]
    found = printed_by(program, "".join(lines))
    assert dict(zip(ON_T4, found, strict=True)) == ON_T4


@pytest.mark.parametrize("operator", [FORWARD, DX, DLORA])
def test_kernels_of_newer_cards_are_refused_on_a_t4(operator: str) -> None:
    expected = "expected " + {FORWARD: "sm75, library or exact", DX: "library or exact", DLORA: "exact"}[operator]
    for kernel in ("few_tokens", "tensor_cores", "sm90", "sm100", "ragged", "gemm"):
        text = f"QLORA_CUDA_KERNEL: {kernel} does not take {operator} of .* on compute capability 7.5: {expected}$"
        with pytest.raises(ValueError, match=text):
            _C.choose(operator, "float16", 1, 4096, 4096, device="sm75", kernel=kernel)
    for kernel in ("", "exact"):
        with pytest.raises(ValueError, match=NO_BFLOAT16):
            _C.choose(operator, "bfloat16", 1, 4096, 4096, device="sm75", kernel=kernel)


@needs_compiler
def test_a_kernel_is_forced_by_its_name_and_parameters(program: pathlib.Path) -> None:
    cases = FORCED | REFUSED
    lines = [line(c, op, "bfloat16", m, 4096, k, 64, experts, forced) for c, op, m, k, experts, forced in cases]
    found = printed_by(program, "".join(lines))
    for (case, expected), text in zip(cases.items(), found, strict=True):
        if case in FORCED:
            assert text == expected, case
        else:
            assert text.startswith("QLORA_CUDA_KERNEL: "), (case, text)
            assert expected in text, (case, text)


@pytest.mark.parametrize("card", CARDS)
def test_python_has_the_names(card: str) -> None:
    for (op, dtype, m, n, k, block_size, experts), expected in CHOICES.items():
        if experts == 0:
            text = expected[CARDS.index(card)] if isinstance(expected, tuple) else expected
            assert _C.choose(op, dtype, m, n, k, block_size, device=card) == text.split()[:1]


@pytest.mark.parametrize("card", ["sm75", *CARDS])
@pytest.mark.parametrize("code", formats.WIDE_CODES)
def test_wide_codes_have_no_tile_on_tensor_cores(code: str, card: str) -> None:
    dtype = "float16" if card == "sm75" else "bfloat16"
    for op, generic in ((FORWARD, "exact" if card == "sm75" else "ragged"), (DX, "exact")):
        problem = {"n": 4096, "k": 4096, "code": code, "device": card}
        assert _C.choose(op, dtype, 16, **problem) == [generic]
        assert _C.choose(op, "float32", 64, **problem) == ["exact"]
        assert _C.choose(op, "float32", 65, **problem) == ["library"]
        assert _C.choose(op, dtype, 17, **problem) in (["library"], ["gemm"])
        for kernel in {"few_tokens", "tensor_cores", "sm75", "sm90", "sm100", "ragged"} - {generic}:
            with pytest.raises(ValueError, match=f"^QLORA_CUDA_KERNEL: {kernel} does not take .* code={code} on"):
                _C.choose(op, dtype, 8, kernel=kernel, **problem)


def test_python_takes_any_card_and_forced_kernel() -> None:
    card = {"arch": 90, "sm_count": 78, "shared_per_cta": 232448, "l2_bytes": 50 << 20}
    problem = (FORWARD, "bfloat16", 64, 4096, 4096)
    assert _C.choose(*problem, device=card) == ["sm90"]
    assert _C.choose(*problem, device=card | {"arch": 89}) == ["tensor_cores"]
    rates = {"clock_khz": 2_040_000, "memory_clock_khz": 6_251_000, "bus_bits": 192, "integrated": 0}
    assert _C.choose(*problem, device=card | {"arch": 89} | rates) == ["tensor_cores"]
    assert _C.choose(*problem, device=card, kernel="ragged:tokens=16") == ["ragged"]
    assert _C.choose(*problem, device="sm80", kernel="tensor_cores:tokens=32,ctas=7") == ["tensor_cores"]
    assert _C.choose(*problem, device="cpu") == _C.choose(*problem)
    for arguments, text in (
        ({"device": "cuda"}, "device: expected cpu, sm75, .* or a dict of a card's attributes, got cuda"),
        ({"device": {"arch": 90}}, "device: expected a dict with arch, sm_count, .*; sm_count is missing"),
        ({"device": card | {"l2_bytes": 0}}, "l2_bytes is 0"),
        ({"device": card | {"sms": 1}}, "device: expected arch, .* got sms"),
        ({"device": card | {"bus_bits": -1}}, "device: expected bus_bits of 0 or more, got -1"),
        ({"device": "sm90", "isa": "scalar"}, "isa: "),
        ({"device": "cpu", "kernel": "ragged"}, "kernel: expected none for the CPU, got ragged"),
        ({"device": "sm100", "kernel": "tensor_cores:tokens=32,ctas=7"}, "tensor_cores cannot run .* with ctas=7"),
        ({"device": "sm90", "kernel": "fused"}, f"QLORA_CUDA_KERNEL: expected .*{NAMES}, got fused"),
    ):
        with pytest.raises(ValueError, match=text):
            _C.choose(*problem, **arguments)
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16 on CUDA, got float64"):
        _C.choose(FORWARD, "float64", 1, 64, 64, device="sm90")
