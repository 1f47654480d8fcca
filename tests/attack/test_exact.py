"""Exactly representable problems: every kernel gives the exact result, with no tolerance, on every instruction set."""

from __future__ import annotations

import pytest
import torch

import exact_problems
from campaign import assert_survived, attack, count
from qlora_ext import _C

SCRIPT = "exact_problems.py"
PROBLEMS = 60  # for each instruction set; scripts/attack --factor 170 makes them 10,000
CUDA_PROBLEMS = 12


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_exact_problems_have_exact_answers(isa: str) -> None:
    assert_survived(attack(SCRIPT, "cpu", count(PROBLEMS), QLORA_CPU_ISA=isa))


@pytest.mark.cuda
def test_exact_problems_have_exact_answers_on_cuda() -> None:
    assert_survived(attack(SCRIPT, "cuda", count(CUDA_PROBLEMS)))


def arguments(x: list[float]) -> dict:
    """y = x."""
    k = len(x)
    codes = torch.full((k, k), 7, dtype=torch.uint8).fill_diagonal_(15).reshape(-1)
    a = {"x": torch.tensor([x], dtype=torch.bfloat16), "packed": codes[0::2] << 4 | codes[1::2], "out_features": k}
    a |= {"absmax": torch.ones(-(-k * k // 32)), "nested_absmax": None, "nested_offset": None, "block_size": 32}
    return a | {"nested_block_size": 256, "bias": None, "lora_a": None, "lora_b": None, "scaling": 1.0}


def test_an_answer_that_is_off_by_a_rounding_is_found() -> None:
    a = arguments([1.0, 3.0, -255.0, 0.0])
    (expected,) = exact_problems.answers("linear_nf4", exact_problems.oracle.linear, a)
    right = a["x"].clone()
    for kernel in ("many_tokens_float", "few_tokens_int"):
        assert exact_problems.compare("linear_nf4", kernel, a, right, [expected]) is None
    for j, value in ((0, 1.0078125), (2, -254.0), (3, 1e-9), (1, float("nan"))):
        wrong = right.clone()
        wrong[0, j] = value
        found = exact_problems.compare("linear_nf4", "many_tokens_float", a, wrong, [expected])
        assert found is not None
        assert f"1 of 4 not exact, the first [0, {j}]" in found
    wrong[0, 1] = 3.015625  # rounding x to 15 bits of 255 has a smaller error
    assert exact_problems.compare("linear_nf4", "few_tokens_int", a, wrong, [expected]) is not None
