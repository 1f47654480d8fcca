"""QLORA_PRINT_KERNELS=1 on CUDA prints one line per distinct problem. Tests run in separate processes, because the
environment is read once."""

from __future__ import annotations

import os
import re

import pytest
import torch

from own_process import run_file

# (m, n, k, dtype): the kernels of forward, dX and LoRA's gradients. Without tokens none runs. cuda/tuning/library.h
# keeps GeForce cards from the library where tensor cores take the shape.
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(CAPABILITY == (7, 5), reason="the device does not compute in bfloat16"),
]
GEFORCE = [(8, 6), (8, 9), (12, 0), (12, 1)]
MANY = {(9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100", **dict.fromkeys([(8, 0), *GEFORCE], "tensor_cores")}
PROBLEMS = {
    (5, 24, 64, "bfloat16"): ("few_tokens", "tensor_cores", "tensor_cores"),
    (5, 7, 33, "float16"): ("ragged", "ragged", "ragged"),
    (5, 24, 64, "float32"): ("exact", "exact", "exact"),
    (1100, 8, 64, "bfloat16"): (*[MANY.get(CAPABILITY, "library")] * 2, "tensor_cores"),
    (1100, 8, 64, "float32"): ("library", "library", "exact"),
    (0, 24, 64, "bfloat16"): (),
}
OF_EXPERTS = {  # (experts, total rows, n, k, dtype)
    (3, 5, 24, 64, "bfloat16"): ("tensor_cores", "tensor_cores", "tensor_cores"),
    (3, 5, 7, 33, "bfloat16"): ("ragged", "ragged", "ragged"),
    (3, 5, 24, 64, "float32"): ("exact", "exact", "exact"),
}
OPERATORS = ("linear_nf4", "linear_nf4_dx", "linear_nf4_dlora")
RANK = 4


def run_problems() -> None:
    from grouped_samples import grouped_sample
    from samples import linear_sample

    ops = torch.ops.qlora
    for m, n, k, dtype in PROBLEMS:
        s = linear_sample(m, n, k, RANK, getattr(torch, dtype), "cuda")
        for _ in range(2):
            y = ops.linear_nf4(*s.args)
            ops.linear_nf4_dx(*s.dx_args(y))
            ops.linear_nf4_dlora(y, s.x, *s.lora_args)
    for experts, m, n, k, dtype in OF_EXPERTS:
        counts = [m, *[0] * (experts - 1)]
        g = grouped_sample(counts, n, k, RANK, getattr(torch, dtype), "cuda", unassigned=0)
        for _ in range(2):
            dy = g.forward()
            g.dx(dy)
            g.dlora(dy)


def printed(value: str | None) -> list[str]:
    """The lines that `run_problems` prints with QLORA_PRINT_KERNELS=value."""
    environment = {name: v for name, v in os.environ.items() if name != "QLORA_PRINT_KERNELS"}
    if value is not None:
        environment["QLORA_PRINT_KERNELS"] = value
    run = run_file(__file__, environment=environment)
    return [line for line in run.stderr.splitlines() if line.startswith("qlora: ")]


def test_one_line_for_each_problem() -> None:
    expected = []
    single = {(f"m={m} n={n} k={k}", "", dtype): kernels for (m, n, k, dtype), kernels in PROBLEMS.items()}
    grouped = {
        (f"experts={experts} m={m} n={n} k={k}", "grouped_", dtype): kernels
        for (experts, m, n, k, dtype), kernels in OF_EXPERTS.items()
    }
    for (sizes, prefix, dtype), kernels in (single | grouped).items():
        for operator, kernel in zip(OPERATORS, kernels, strict=False):
            parameters = r"( [a-z_]+=\d+)+"
            expected.append(f"qlora: {prefix}{operator} cuda {sizes} rank={RANK} {dtype} -> {kernel}{parameters}")
    lines = printed("1")
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_printed_unasked(value: str | None) -> None:
    assert printed(value) == []


if __name__ == "__main__":
    run_problems()
