"""The CPU's linear layer and all its gradients, compared with the oracle on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import isas
import reference
from operator_results import RESULTS, call, check_samples, dx, forward, gradient
from samples import DTYPES, LinearSample, linear_sample

test_on, test_forced_instruction_set_runs = isas.test_on, isas.test_forced_instruction_set_runs
ODD = [  # m, n, k, rank, block size, double quantization, dropout, and the code if not NF4
    (0, 48, 64, 4, 64, True, 0.0),
    (1, 1, 1, 1, 64, True, 0.0),
    (2, 130, 333, 16, 64, True, 0.0),
    (7, 1, 640, 1, 4096, True, 0.0),
    (8, 77, 1030, 5, 64, True, 0.2),
    (16, 65, 200, 8, 32, False, 0.0),
    (17, 33, 63, 5, 32, True, 0.3),
    (24, 60, 2240, 16, 64, True, 0.2),  # dx in strips wider than the dropout mask of one draw
    (33, 100, 100, 1, 64, False, 0.1),
    (63, 70, 192, 64, 128, True, 0.0),
    (64, 192, 256, 16, 64, True, 0.0),
    (64, 130, 96, 16, 32, True, 0.0),
    (65, 48, 577, 0, 64, True, 0.0),
    (65, 31, 1000, None, 256, True, 0.0),
    (100, 51, 321, 33, 512, False, 0.5),
    (300, 64, 576, 16, 1024, True, 0.1),
    (300, 1, 130, 3, 64, True, 0.0),
    (40, 300, 1100, 256, 2048, True, 0.0),
    (530, 770, 72, 16, 64, True, 0.0),
    (96, 40, 128, 7, 64, True, 1.0),
    (1024, 1536, 576, 16, 64, True, 0.0),  # the largest blocks of the output
    (2, 130, 333, 16, 64, True, 0.0, "shuffled"),
    (8, 77, 1030, 5, 64, True, 0.2, "shuffled"),
    (17, 33, 63, 5, 16, True, 0.3),
    (40, 300, 1104, 25, 16, True, 0.0, "shuffled"),
    (64, 192, 256, 16, 64, False, 0.0, "shuffled"),
]


def name(case: tuple) -> str:
    m, n, k, rank, block, double_quant, p, *code = case
    return "-".join(
        [f"{m}x{n}x{k}-r{rank}-b{block}", *([] if double_quant else ["plain"]), *([f"p{p}"] if p else []), *code]
    )


def make(case: tuple, dtype: torch.dtype, seed: int = 0) -> tuple[LinearSample, torch.Tensor]:
    m, n, k, rank, block, double_quant, p, *code = case
    options = {"block_size": block, "double_quant": double_quant, "seed": seed, "code": code[0] if code else "nf4"}
    s = linear_sample(m, n, k, rank, dtype, dropout_p=p, **options)
    return s, gradient(s, seed + 1000)


def check(results: Callable, case: tuple, dtype: torch.dtype) -> None:
    check_samples(results, lambda seed: make(case, dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op}-{name(case)}")
        for op in RESULTS
        for case in ODD
        if op != "linear_nf4_dlora" or case[3]
    ],
)
def test_results(op: str, case: tuple, dtype: torch.dtype) -> None:
    check(RESULTS[op], case, dtype)


@pytest.mark.parametrize("block", reference.BLOCK_SIZES)
@pytest.mark.parametrize("k", [128, 131, 160])
@pytest.mark.parametrize("code", reference.CODE_KINDS)
def test_every_block_size(block: int, k: int, code: str) -> None:
    case = (20, 70, k, 4, block, True, 0.0, code)
    check(forward, case, torch.bfloat16)
    check(dx, case, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(40, 50, 100, 4, 64, True, 0.0), (5, 96, 1100, 0, 64, True, 0.0)], ids=name)
def test_nonfinite_tokens_stay_alone(case: tuple, dtype: torch.dtype) -> None:
    """Padding does not spread values: NaN and infinity reach only their own rows."""
    s, dy = make(case, dtype)
    (y,), (dx,) = call("linear_nf4", s, dy), call("linear_nf4_dx", s, dy)
    s.x[3, -1], s.x[1, 70], dy[4, -1], dy[0, 5] = float("inf"), float("nan"), float("nan"), -float("inf")
    (bad_y,), (bad_dx,) = call("linear_nf4", s, dy), call("linear_nf4_dx", s, dy)
    assert not bad_y[[1, 3]].isfinite().any()
    assert bad_dx[4].isnan().all()
    assert not bad_dx[0].isfinite().all()
    rows = torch.arange(case[0])
    of_y, of_dx = (rows != 1) & (rows != 3), (rows != 0) & (rows != 4)
    assert torch.equal(bad_y[of_y], y[of_y])
    assert torch.equal(bad_dx[of_dx], dx[of_dx])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (64, 300, 320, 8, 64, True, 0.1),
        (300, 5, 130, 3, 64, True, 0.0),
        (80, 300, 64, 8, 64, True, 0.0),  # few columns, so that the tokens of dx are divided among threads
        (2, 3000, 320, 8, 64, True, 0.0),  # rows of W that threads steal from each other
    ],
    ids=name,
)
def test_threads_do_not_change_a_bit(case: tuple, dtype: torch.dtype) -> None:
    s, dy = make(case, dtype)

    def results() -> list[torch.Tensor]:
        return [t for op in RESULTS for t in call(op, s, dy)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        for count in (2, 3, 7, 3, 64, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(results(), one, strict=True))
    finally:
        torch.set_num_threads(threads)
