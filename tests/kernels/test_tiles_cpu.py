"""The kernels for a tile unit, with tile operations in plain C++ that check their use, and on the hardware.

tests/kernels/software_tiles/problems.cpp compares them with plain float64 loops, and in int8 with the vector unit's
bits. Every request for scratch gets new memory of exactly its size, filled with NaNs. So a read beyond an operand, or
of a value that was never written, is seen.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from cpu_sources import flags
from qlora_ext import _C

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = [
    "tests/kernels/software_tiles/problems.cpp",
    *(f"cpp/{name}.cpp" for name in ("format/custom_codes", "cpu/float64/linear", "cpu/isa/isa")),
]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the problems with")
needs_tiles = pytest.mark.skipif(
    "amx_bf16" not in _C.cpu_isas(), reason="this processor has no tile unit, or the system keeps it"
)


def build(to: pathlib.Path, isa: str, *options: str) -> pathlib.Path:
    command = ["g++", "-std=c++20", "-O2", "-pthread", "-ffp-contract=off", f"-DTILES={isa}", "-DQLORA_X86=1"]
    command += [f"-DQLORA_CPU_ISAS=QLORA_SET({isa})"]
    command += [f"-I{ROOT}", f"-I{ROOT / 'tests/kernels/software_tiles'}", *options, *(str(ROOT / s) for s in SOURCES)]
    run = subprocess.run([*command, "-o", str(to / "problems")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[:4000]
    return to / "problems"


def check(problems: pathlib.Path, seed: int, *most: str) -> None:
    env = os.environ | {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0"
    }  # the tiles ask whether memory is on the stack
    run = subprocess.run([problems, str(seed), *most], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[:4000]
    assert run.stdout.endswith(" problems\n")


@pytest.mark.slow
@needs_compiler
def test_software_tiles(tmp_path: pathlib.Path) -> None:
    check(build(tmp_path, "software_tiles"), 0)


@pytest.mark.slow
@needs_compiler
def test_software_tiles_under_sanitizers(tmp_path: pathlib.Path) -> None:
    """The five largest problems would take minutes, and run without sanitizers."""
    check(build(tmp_path, "software_tiles", *SANITIZERS), 1, str(10**7))


@pytest.mark.slow
@needs_compiler
@needs_tiles
def test_hardware_tiles(tmp_path: pathlib.Path) -> None:
    problems = build(tmp_path, "amx_bf16", *flags("amx_bf16"))
    for seed in range(8):
        check(problems, seed)


WITHOUT_PERMISSION = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(8192)  # too small for a signal frame with tiles, so that Linux refuses them
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0

import torch, qlora_ext
from qlora_ext import _C

w, x = torch.randn(96, 320).bfloat16(), torch.randn(40, 320).bfloat16()
w4 = qlora_ext.quantize_nf4(w)
y = qlora_ext.linear_nf4(x, w4).double()
want = x.double() @ w4.dequantize(torch.float32).double().T
assert (y - want).norm() < 1e-2 * want.norm()
print(_C.cpu_isa())
"""


@needs_tiles
def test_all_else_works_where_the_system_refuses_tiles() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_PERMISSION], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "avx512_bf16\n"
