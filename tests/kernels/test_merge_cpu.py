"""The codes of a weight with its adapter have the oracle's bits on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import isas
import reference
from codec_checks import assert_bits
from qlora_ext.form import Form
from qlora_ext.weight import Weight4bit, quantize

OPS = torch.ops.qlora
test_on, test_forced_instruction_set_runs = isas.test_on, isas.test_forced_instruction_set_runs

ZERO_POINTS = Form("int4", "float16", 64, 256, "zero_point8")
FORMS = ["nf4", "fp4", "mxfp4", "nvfp4", "int4", "q4_1", "q4_k", "iq4_nl", ZERO_POINTS]
SHAPES = [(7, 96), (37, 512), (5, 90), (33, 31), (1, 7), (3, 0)]


def weight_in(form: Form | str, n: int, k: int) -> Weight4bit:
    if isinstance(form, str):
        return quantize(torch.randn(n, k), form)
    blocks = -(-n * k // form.block_size)
    packed, absmax = OPS.quantize_nf4(torch.randn(n, k), form.block_size, form.code)
    zero_points = torch.randint(0, 4, (blocks,), dtype=torch.uint8)
    options = {"block_size": form.block_size, "code": form.code, "block_offsets": zero_points}
    return Weight4bit(packed, absmax.half(), shape=(n, k), dtype=torch.float32, **options)


def merge(w4: Weight4bit, a: torch.Tensor, b: torch.Tensor, scaling: float, seed: int) -> torch.Tensor:
    return OPS.merge_lora_nf4(*w4.operands(a, b, scaling, seed))


@pytest.mark.parametrize("rank", [0, 1, 16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_the_oracles(form: Form | str, n: int, k: int, rank: int) -> None:
    w4 = weight_in(form, n, k)
    a, b = 0.1 * torch.randn(rank, k), 0.3 * torch.randn(n, rank)
    w = w4.dequantize(torch.float32)
    offsets = w.new_zeros(n, k) - w4.without_offsets(w.new_zeros(n, k))
    for seed in (0, 2**40 + 5):
        given = w.numpy(), offsets.numpy(), w4.decoded_scales().numpy(), w4.block_size, a.numpy(), b.numpy(), 0.7, seed
        expected = reference.merge_lora_nf4(*given, reference.CODES[w4.code])
        assert_bits(merge(w4, a, b, 0.7, seed), expected, "codes")


def test_adapters_in_other_layouts_and_of_no_number() -> None:
    w4 = weight_in("nf4", 40, 128)
    a, b = torch.randn(128, 4), torch.randn(4, 40)
    assert_bits(merge(w4, a.T, b.T, 1.0, 1), merge(w4, a.T.contiguous(), b.T.contiguous(), 1.0, 1).numpy(), "codes")
    b[2, 3] = float("nan")
    codes = reference.unpack(merge(w4, a.T, b.T, 1.0, 1).numpy(), 40 * 128).reshape(40, 128)
    assert (codes[3] == 0).all()
    assert np.count_nonzero(codes[4]) > 0


def test_wrong_arguments_are_rejected() -> None:
    w4 = weight_in("nf4", 40, 128)
    a, b = torch.randn(4, 128), torch.randn(40, 4)
    wrong = [
        ((a.bfloat16(), b), "lora_a: expected Float, got BFloat16"),
        ((a[0], b), r"lora_a: expected a matrix, got shape \[128\]"),
        ((a, b[:, :3]), r"lora_b: expected shape \[40, 4\]"),
        ((a[:, :64], b), "packed: expected 1280 bytes"),
        ((a, b, float("inf")), "scaling: expected a finite number"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            merge(w4, *given[:2], *(given[2:] or (1.0,)), 0)
