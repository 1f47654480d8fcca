"""Each CPU kernel, selected by name, for every shape that it accepts, not only those for which tuning.h selects it.

QLORA_CPU_KERNEL, which conftest.py sets for the whole run, is read by every call. Each instruction set runs this file
again in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

import isas
from operator_results import RESULTS, call
from qlora_ext import _C
from samples import LinearSample
from test_linear_cpu import check, make

test_on = isas.test_on
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Operator, kernel -> the types for which the set in use has it. float64 has a test of its own.
KERNELS = {
    (op, kernel): [dtype for dtype in (F32, BF16, F16) if str(dtype)[6:] in types]
    for op in RESULTS
    for kernel, types in _C.kernels(op).items()
    if kernel != "float64"
}

# n, k, rank, block size, double quantization, dropout, and the code if not NF4. The last segment of x, k % 256 values,
# is long enough that float16 errors do not vary much by chance.
SHAPES = [
    (96, 320, 16, 64, True, 0.0),
    (33, 255, 5, 64, True, 0.2),  # rows of W begin in the middle of a byte, and some reach into another chunk
    (70, 100, 1, 32, False, 0.0),
    (40, 1100, 8, 128, True, 0.0),
    (130, 64, 64, 4096, True, 0.3),
    (119, 36, 30, 64, True, 0.0),
    (96, 320, 16, 64, True, 0.1, "shuffled"),
    (48, 176, 3, 16, True, 0.0, "shuffled"),  # every other row begins in the middle of a group
]
WHOLE = [s for s in SHAPES if s[1] % 64 == 0 and s[3] >= 64]  # 64 columns have one scale
INT_WHOLE = [s for s in SHAPES if s[1] % 64 == 0 and s[3] >= 32]
DX_WHOLE = [(192, *WHOLE[0][1:]), (320, *WHOLE[-1][1:]), (1088, 192, 16, 32, True, 0.2)]  # and whole groups of rows
DX_INT_TOKENS = 2 if _C.cpu_isa() == "scalar" else 16  # plain C++ is kept small
FEW = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 18, 21, 24, 31, 32, 33, 40, 47, 48, 63, 64)
MANY = (1, 4, 17, 33, 65, 130)


def cases(op: str, kernel: str) -> Iterator[tuple]:
    """m, n, k, rank, block size, double quantization, dropout."""
    shapes: Sequence[tuple] = SHAPES
    tokens: Sequence[int] = MANY
    if kernel.startswith("few_tokens"):
        tokens = FEW
        if (op, kernel) == ("linear_nf4_dx", "few_tokens_int"):
            shapes, tokens = WHOLE, range(1, DX_INT_TOKENS + 1)
    elif kernel == "many_tokens_int":
        shapes = INT_WHOLE if op == "linear_nf4" else DX_WHOLE
    for i, m in enumerate(tokens):
        yield (m, *shapes[i % len(shapes)])
        if m in (1, 8, 16, 17, 33, 48):
            yield (m, *shapes[(i + 1) % len(shapes)])


ALL = [
    pytest.param(op, kernel, case, dtype, id=f"{op}-{kernel}-{'x'.join(map(str, case[:3]))}-{str(dtype)[6:]}")
    for (op, kernel), dtypes in KERNELS.items()
    if dtypes
    for case in cases(op, kernel)
    for dtype in dtypes
]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    assert "QLORA_CPU_KERNEL" in os.environ, "it must be there before the first call"
    return lambda kernel: monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)


@pytest.mark.parametrize(("op", "kernel", "case", "dtype"), ALL)
def test_accuracy(op: str, kernel: str, case: tuple, dtype: torch.dtype, force: Callable) -> None:
    force(kernel)
    check(RESULTS[op], case, dtype)


@pytest.mark.parametrize(("op", "kernel"), [key for key, dtypes in KERNELS.items() if dtypes], ids=lambda name: name)
@pytest.mark.parametrize("m", [1, 6, 16, 17, 33, 48])
def test_threads_do_not_change_a_bit(op: str, kernel: str, m: int, force: Callable) -> None:
    if (op, kernel) == ("linear_nf4_dx", "few_tokens_int"):
        m = min(m, DX_INT_TOKENS)
    force(kernel)
    threads = torch.get_num_threads()
    for n, k, block in ((704, 576, 64), (333, 555, 32), (1216, 128, 32), (320, 2112, 64)):
        if (k % 64 or block < 64) and (op, kernel) == ("linear_nf4_dx", "few_tokens_int"):
            continue
        if k % 64 and kernel == "many_tokens_int":
            continue
        for dtype in KERNELS[op, kernel]:
            s, dy = make((m, n, k, 24, block, True, 0.1), dtype)
            results = []
            try:
                for count in (1, 2, 3, 7):
                    torch.set_num_threads(count)
                    results.append(call(op, s, dy))
            finally:
                torch.set_num_threads(threads)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True)), (n, k, dtype)


REFUSED = [  # operator, kernel, case, type: problems that no set takes
    ("linear_nf4", "few_tokens_int", (4, *SHAPES[0]), F32),
    ("linear_nf4", "many_tokens_bf16", (4, *SHAPES[0]), F16),
    ("linear_nf4_dx", "many_tokens_tiles", (4, *SHAPES[0]), F16),
    ("linear_nf4", "float64", (4, *SHAPES[0]), BF16),
    ("linear_nf4", "few_tokens_int", (65, *SHAPES[0]), BF16),
    ("linear_nf4", "few_tokens_bf16", (4, *SHAPES[0]), F16),
    ("linear_nf4", "many_tokens_int", (4, *SHAPES[0]), F32),
    ("linear_nf4", "many_tokens_int", (4, *SHAPES[1]), BF16),  # ragged
    ("linear_nf4", "many_tokens_int", (4, 40, 320, 1, 16, True, 0.0), BF16),
    ("linear_nf4_dx", "many_tokens_int", (4, *DX_WHOLE[0]), F16),
    ("linear_nf4_dx", "many_tokens_int", (4, *SHAPES[0]), BF16),  # 96 rows
    ("linear_nf4_dlora", "many_tokens_int", (4, *SHAPES[0]), BF16),
    ("linear_nf4_dx", "few_tokens_int", (17, *SHAPES[0]), BF16),
    ("linear_nf4_dx", "few_tokens_int", (4, *SHAPES[1]), BF16),
    ("linear_nf4_dx", "few_tokens_float", (65, *SHAPES[0]), BF16),
    ("linear_nf4_dlora", "few_tokens_float", (4, *SHAPES[0]), BF16),
    ("linear_nf4", "few_tokens_float", (4, 40, 328, 1, 16, True, 0.0), BF16),  # a chunk of five scales
]


@pytest.mark.parametrize(("op", "kernel", "case", "dtype"), REFUSED)
def test_problems_that_a_kernel_does_not_accept_are_rejected(
    op: str, kernel: str, case: tuple, dtype: torch.dtype, force: Callable
) -> None:
    s, dy = make(case, dtype)
    force(kernel)
    text = f"QLORA_CPU_KERNEL: {kernel} of {_C.cpu_isa()} does not take {op} of m={case[0]} "
    with pytest.raises(ValueError, match=text):
        call(op, s, dy)


def test_kernels_that_the_set_lacks_are_refused(force: Callable) -> None:
    s, dy = make((4, *SHAPES[0]), BF16)
    lacking = [key for key, dtypes in KERNELS.items() if not dtypes]
    assert ("linear_nf4_dlora", "few_tokens_int") in lacking
    for op, kernel in lacking:
        force(kernel)
        with pytest.raises(ValueError, match=f"{kernel} of {_C.cpu_isa()} does not take {op}"):
            call(op, s, dy)


def test_a_kernel_that_finds_it_cannot_serve_says_so(force: Callable) -> None:
    s, dy = make((1, 1, 2**21, 0, 64, True, 0.0), F16)
    force("few_tokens_int")
    with pytest.raises(ValueError, match=r"linear_nf4 of m=1 .* was not served by few_tokens_int \(too large for"):
        call("linear_nf4", s, dy)
    force("")
    assert torch.isfinite(call("linear_nf4", s, dy)[0]).all()  # another kernel computes it


def test_a_kernel_that_does_not_exist_is_refused(force: Callable) -> None:
    force("few_token")
    with pytest.raises(ValueError, match="expected one of few_tokens_int8, few_tokens_int, .*float64, got few_token"):
        call("linear_nf4", *make((1, *SHAPES[0]), BF16))


def test_float64_has_one_kernel(force: Callable) -> None:
    s, dy = make((3, *SHAPES[1]), F32)
    wide = LinearSample(s.x.double(), s.w4, s.bias.double(), s.lora_a.double(), s.lora_b.double(), 0.5, 0.2, 7)
    plain = call("linear_nf4", wide, dy.double())
    force("float64")
    assert torch.equal(call("linear_nf4", wide, dy.double())[0], plain[0])


MANY_BF16 = ["many_tokens_bf16", "many_tokens_float"]
CHOICES = [  # operator, type, m, n, k, block size, set -> kernels
    ("linear_nf4", "bfloat16", 1, 96, 320, 64, "avx512", ["few_tokens_int", "many_tokens_int"]),
    ("linear_nf4", "bfloat16", 48, 96, 320, 64, "avx512", ["few_tokens_int", "many_tokens_int"]),
    ("linear_nf4", "bfloat16", 48, 96, 320, 32, "avx512", ["few_tokens_int", "many_tokens_int"]),
    ("linear_nf4", "bfloat16", 1, 96, 320, 16, "avx512", ["few_tokens_int", "many_tokens_float"]),
    ("linear_nf4", "bfloat16", 1, 96, 328, 16, "avx512", ["many_tokens_float"]),
    ("linear_nf4", "bfloat16", 49, 96, 320, 64, "avx512", ["many_tokens_int"]),
    ("linear_nf4", "bfloat16", 49, 96, 64, 64, "avx512", ["many_tokens_float"]),
    ("linear_nf4", "bfloat16", 49, 96, 320, 32, "avx512", ["many_tokens_int"]),
    ("linear_nf4", "float16", 20, 96, 320, 64, "avx2", ["few_tokens_int", "many_tokens_int"]),
    ("linear_nf4", "float16", 21, 96, 320, 64, "avx2", ["many_tokens_int"]),
    ("linear_nf4", "float16", 49, 96, 320, 64, "avx512_bf16", ["many_tokens_int"]),
    ("linear_nf4", "float16", 24, 96, 333, 64, "avx2", ["few_tokens_int", "many_tokens_float"]),
    ("linear_nf4", "float16", 25, 96, 333, 64, "avx2", ["many_tokens_float"]),
    ("linear_nf4", "bfloat16", 20, 96, 320, 64, "avx_vnni", ["few_tokens_int", "many_tokens_int"]),
    ("linear_nf4_dx", "bfloat16", 17, 256, 320, 64, "avx_vnni", ["many_tokens_int"]),
    ("linear_nf4", "float32", 8, 96, 320, 64, "avx512", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4", "float32", 8, 96, 320, 64, "avx2", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4", "float32", 9, 96, 320, 64, "avx2", ["many_tokens_float"]),
    ("linear_nf4", "bfloat16", 10, 9, 320, 64, "avx512_bf16", ["few_tokens_int", *MANY_BF16]),
    ("linear_nf4", "bfloat16", 11, 9, 320, 64, "avx512_bf16", MANY_BF16),
    ("linear_nf4", "bfloat16", 1, 96, 320, 64, "scalar", ["many_tokens_float"]),
    ("linear_nf4", "bfloat16", 0, 96, 320, 64, "avx512", ["many_tokens_float"]),
    ("linear_nf4", "float64", 4, 96, 320, 64, "avx512", ["float64"]),
    ("linear_nf4_dx", "float16", 16, 96, 320, 64, "avx512", ["few_tokens_int"]),
    ("linear_nf4_dx", "float16", 8, 96, 320, 32, "avx512", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4_dx", "float16", 4, 96, 320, 64, "avx2", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4_dx", "float16", 5, 96, 320, 64, "avx2", ["many_tokens_float"]),
    ("linear_nf4_dx", "float16", 8, 96, 333, 64, "avx2", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4_dx", "float16", 9, 96, 333, 64, "avx2", ["many_tokens_float"]),
    ("linear_nf4_dx", "bfloat16", 3, 256, 320, 64, "avx2", ["few_tokens_float", "many_tokens_int"]),
    ("linear_nf4_dx", "bfloat16", 4, 256, 320, 64, "avx2", ["many_tokens_int"]),
    ("linear_nf4_dx", "bfloat16", 17, 320, 320, 64, "avx512", ["many_tokens_int"]),
    ("linear_nf4_dx", "bfloat16", 17, 192, 320, 64, "avx512", ["many_tokens_float"]),
    ("linear_nf4_dx", "float16", 17, 256, 320, 64, "avx512", ["many_tokens_float"]),
    ("linear_nf4_dx", "float32", 1, 96, 320, 64, "avx512", ["many_tokens_float"]),
    ("linear_nf4_dx", "bfloat16", 6, 96, 320, 64, "avx512_bf16", ["few_tokens_int"]),
    ("linear_nf4_dx", "bfloat16", 7, 96, 320, 64, "avx512_bf16", MANY_BF16),
    ("linear_nf4_dlora", "bfloat16", 4, 96, 320, 64, "avx512_bf16", MANY_BF16),
    ("linear_nf4_dlora", "float16", 4, 96, 320, 64, "avx512_bf16", ["many_tokens_float"]),
    ("linear_nf4", "bfloat16", 6, 96, 320, 64, "amx_bf16", ["few_tokens_int", "many_tokens_tiles", *MANY_BF16]),
    ("linear_nf4", "bfloat16", 7, 96, 320, 64, "amx_bf16", ["many_tokens_tiles", *MANY_BF16]),
    ("linear_nf4", "float16", 48, 96, 320, 64, "amx_bf16", ["few_tokens_int", "many_tokens_int"]),
    ("linear_nf4_dx", "bfloat16", 8, 96, 320, 64, "amx_bf16", ["few_tokens_int"]),
    ("linear_nf4_dx", "bfloat16", 9, 96, 320, 64, "amx_bf16", ["many_tokens_tiles", *MANY_BF16]),
    ("linear_nf4_dlora", "bfloat16", 4, 96, 320, 64, "amx_bf16", ["many_tokens_tiles", *MANY_BF16]),
    ("linear_nf4", "bfloat16", 2, 96, 320, 64, "neon", ["few_tokens_int", "many_tokens_float"]),
    ("linear_nf4", "float16", 4, 96, 333, 64, "neon", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4", "bfloat16", 5, 96, 320, 64, "neon", ["many_tokens_float"]),
    ("linear_nf4", "float32", 4, 96, 320, 64, "neon", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4", "bfloat16", 12, 96, 320, 64, "neon_bf16", ["few_tokens_bf16", *MANY_BF16]),
    ("linear_nf4", "bfloat16", 13, 96, 320, 64, "neon_bf16", MANY_BF16),
    ("linear_nf4", "float16", 1, 96, 320, 64, "neon_bf16", ["few_tokens_int", "many_tokens_float"]),
    ("linear_nf4", "bfloat16", 12, 96, 320, 64, "neon_i8mm", ["few_tokens_int", *MANY_BF16]),
    ("linear_nf4", "bfloat16", 12, 96, 320, 32, "neon_i8mm", ["few_tokens_bf16", *MANY_BF16]),
    ("linear_nf4", "bfloat16", 13, 96, 320, 64, "neon_i8mm", MANY_BF16),
    ("linear_nf4", "float16", 24, 96, 320, 64, "neon_i8mm", ["few_tokens_int", "many_tokens_float"]),
    ("linear_nf4", "float16", 25, 96, 320, 64, "neon_i8mm", ["many_tokens_float"]),
    ("linear_nf4", "float16", 5, 96, 320, 32, "neon_i8mm", ["many_tokens_float"]),
    ("linear_nf4_dx", "bfloat16", 3, 96, 320, 64, "neon", ["few_tokens_float", "many_tokens_float"]),
    ("linear_nf4_dx", "bfloat16", 4, 96, 320, 64, "neon", ["many_tokens_float"]),
    ("linear_nf4_dx", "bfloat16", 2, 96, 320, 64, "neon_bf16", MANY_BF16),
    ("linear_nf4_dlora", "bfloat16", 4, 96, 320, 64, "neon_bf16", MANY_BF16),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c[:-1])))
def test_the_choice(choice: tuple) -> None:
    op, dtype, m, n, k, block_size, isa, kernels = choice
    assert _C.choose(op, dtype, m, n, k, block_size, isa) == kernels


def test_without_integers() -> None:
    code = f"from qlora_ext import _C\nfor c in {[choice[:-1] for choice in CHOICES]!r}: print(*_C.choose(*c))"
    env = os.environ | {"QLORA_CPU_INTEGERS": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    chosen = [line.split() for line in run.stdout.splitlines()]
    assert len(chosen) == len(CHOICES)
    for kernels in chosen:
        assert not any(kernel.endswith("_int") for kernel in kernels)
        assert kernels[-1] in ("many_tokens_float", "float64")  # which take everything


def test_the_set_has_what_is_chosen() -> None:
    for op, dtype, m, n, k, block_size, *_ in CHOICES:
        has = {kernel for kernel, types in _C.kernels(op).items() if dtype in types}
        chosen = _C.choose(op, dtype, m, n, k, block_size)
        assert chosen
        assert set(chosen) <= has, (op, dtype, m)


def test_unknown_arguments_of_choose_are_named() -> None:
    for args, text in (
        (("linear", "float32", 1, 1, 1), "op: expected linear_nf4, .* got linear"),
        (("linear_nf4", "int8", 1, 1, 1), "dtype: expected .* got int8"),
        (("linear_nf4", "float32", -1, 1, 1), "m: expected 0 or more, got -1"),
        (("linear_nf4", "float32", 1, 1, 1, 63), "block_size: .* got 63"),
        (("linear_nf4", "float32", 1, 1, 1, 64, "sse9"), "isa: expected .* got sse9"),
        (("linear_nf4", "float32", 1, 1, 1, 64, None, "fp8"), "code: expected nf4, .* got fp8"),
    ):
        with pytest.raises(ValueError, match=text):
            _C.choose(*args)
    with pytest.raises(ValueError, match="op: expected linear_nf4, .* got linear"):
        _C.kernels("linear")


def test_kernels_are_printed_once_a_problem() -> None:
    code = (
        "import torch, qlora_ext as q; w = q.quantize_nf4(torch.randn(96, 320)); "
        "[q.linear_nf4(torch.randn(m, 320).half(), w) for m in (3, 3, 200)]"
    )
    env = os.environ | {"QLORA_PRINT_KERNELS": "1", "QLORA_CPU_KERNEL": ""}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    lines = [line for line in run.stderr.splitlines() if line.startswith("qlora: ")]
    problem = f"qlora: linear_nf4 cpu m={{}} n=96 k=320 rank=0 float16 -> {{}} isa={_C.cpu_isa()}"
    first, many = (_C.choose("linear_nf4", "float16", m, 96, 320)[0] for m in (3, 200))
    assert lines == [problem.format(3, first), problem.format(200, many)]
