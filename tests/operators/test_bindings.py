"""`_C`: the format on numpy arrays, without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import qlora_ext
import reference
from cpu_sources import SETS
from qlora_ext import _C


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("75-real;80-real;90-virtual", (7, 5), True),  # T4
        ("75-real;80-real;90-virtual", (7, 0), False),  # V100
        ("75-real;80-real;90-virtual", (6, 0), False),  # P100
        ("80-real;90-virtual", (7, 5), False),
        ("80-real;90-virtual", (8, 0), True),
        ("80-real;90-virtual", (8, 9), True),
        ("80-real;90-virtual", (8, 7), False),  # Orin: Tegra does not run the machine code of other chips
        ("80-real;87-real", (8, 7), True),
        ("87-real", (8, 9), False),
        ("80-virtual", (8, 7), True),  # PTX is compiled for it
        ("70-real", (7, 2), False),
        ("72-real", (7, 5), False),
        ("70-real", (7, 5), True),
        ("50-real", (5, 3), False),
        ("60-real;61-real", (6, 2), False),
        ("80-real;90-virtual", (9, 0), True),
        ("80-real;90-virtual", (12, 1), True),
        ("80-real;90-real", (10, 0), False),
        ("80-real;90a-real;100-real", (9, 0), True),
        ("90a-real;90a-virtual", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f-real", (11, 0), False),
        ("90", (9, 0), True),
        ("", (9, 0), False),
    ],
)
def test_which_devices_a_build_serves(archs: str, capability: tuple[int, int], expected: bool) -> None:
    assert qlora_ext._library.serves(archs, capability) is expected


def test_tables() -> None:
    assert np.array_equal(_C.code_values("nf4"), reference.NF4)
    assert np.array_equal(_C.dynamic8_code(), reference.DYNAMIC8)


@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (64,), (3, 65), (7, 128)])
@pytest.mark.parametrize("block_size", reference.BLOCK_SIZES)
def test_quantize_equals_the_oracle(shape: tuple[int, ...], block_size: int) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed, absmax = _C.quantize_nf4(w, block_size)
    expected = reference.quantize_nf4(w, block_size)
    assert np.array_equal(packed, expected[0])
    assert np.array_equal(absmax, expected[1])
    decoded = _C.dequantize_nf4(packed, absmax, w.size, block_size)
    assert np.array_equal(decoded, reference.dequantize_nf4(*expected, w.size, block_size))


@pytest.mark.parametrize("count", [0, 1, 255, 257, 70000])
def test_double_quantization_equals_the_oracle(count: int) -> None:
    absmax = np.random.default_rng(1).random(count, dtype=np.float32)
    codes, nested, offset = _C.quantize_absmax(absmax)
    expected = reference.quantize_absmax(absmax)
    assert np.array_equal(codes, expected[0])
    assert np.array_equal(nested, expected[1])
    assert offset == expected[2]
    assert np.array_equal(_C.dequantize_absmax(codes, nested, offset), reference.dequantize_absmax(*expected))


def test_wrong_arguments_are_named() -> None:
    w = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="block_size.*got 65"):
        _C.quantize_nf4(w, 65)
    with pytest.raises(ValueError, match="absmax: expected 1 elements, got 2"):
        _C.dequantize_nf4(np.zeros(32, np.uint8), np.zeros(2, np.float32), 64)
    with pytest.raises(ValueError, match="packed: expected 32 elements, got 31"):
        _C.dequantize_nf4(np.zeros(31, np.uint8), np.zeros(1, np.float32), 64)
    with pytest.raises(TypeError):
        _C.quantize_nf4(w.astype(np.float64))


def test_the_build_has_the_sets_that_run_here() -> None:
    built = _C.build_info()["cpu_isas_built"]
    assert "scalar" in built
    assert set(_C.cpu_isas()) <= set(built)


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_a_forced_isa_is_the_one_in_use(isa: str) -> None:
    code = "import qlora_ext; print(qlora_ext.build_info()['cpu_isa'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"QLORA_CPU_ISA": isa}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == isa


def test_an_isa_that_does_not_exist_is_refused() -> None:
    """The error names those that there are: sources.cmake and isa.h have the same."""
    run = subprocess.run(
        [sys.executable, "-c", "import qlora_ext"], env={"QLORA_CPU_ISA": "sse9"}, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert f"expected {', '.join(SETS[:-1])} or {SETS[-1]}, got sse9" in run.stderr
