"""The work of weights in other forms than NF4's, by the kernel simulator's counters, beside NF4's in blocks of the same
size. As in test_cuda_profile.py, the cases run in one process of this file, which prints the counters of each launch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_profiles import Launch, Recorder, launches_of_cases, needs_counters

pytestmark = needs_counters

N, K = 384, 1024
BF16 = torch.bfloat16
NF4 = ("nf4", "nested8", "no")
# What checkpoints have in blocks of a size: MXFP4, Q4_0, compressed-tensors' INT4, NVFP4.
FORMATS = {
    64: [("int4", "float16", "no"), ("int4", "bfloat16", "no"), ("fp4", "float32", "no")],
    32: [("e2m1", "table8", "no"), ("int4", "float16", "no"), ("iq4_nl", "float16", "no")],
    16: [("e2m1", "table8", "no")],
}
# AWQ and GPTQ, compressed-tensors, and Q4_1.
ZERO_POINTS = {
    128: [("uint4", "float16", "zero_point8")],
    64: [("uint4", "bfloat16", "zero_point8"), ("int4", "float32", "zero_point8")],
}
OFFSETS = {32: [("uint4", "float16", "float16")]}
MOST = {128: 1.05, 64: 1.05, 32: 1.05, 16: 1.15}
# What loading a zero point costs where a warp decodes few weights per block.
MOST_WITH_ZERO_POINTS = {"dequantize": 1.08, "dx 16": 1.07}
OPERATORS = ["dequantize", *(f"forward {m}" for m in (1, 16, 64)), *(f"dx {m}" for m in (16, 64))]


def run_cases(profile: Path) -> dict[str, Any]:
    from test_formats_cuda import normal, weight

    ops = torch.ops.qlora
    record = Recorder(profile)
    for block in MOST:
        for form in [NF4, *(form for group in (FORMATS, ZERO_POINTS, OFFSETS) for form in group.get(block, []))]:
            code, scales, offsets = form
            w4 = weight((N, K), code, scales, offsets, block).to("cuda")
            no_lora = None, None, 1.0, 0.0, 0, None
            name = f"{block} {' '.join(form)}"
            record(f"{name} dequantize", w4.dequantize, BF16)
            for m in (1, 16, 64):
                x = normal((m, K), BF16)
                record(f"{name} forward {m}", ops.linear_nf4, x, *w4.operands(N, None, *no_lora))
            for m in (16, 64):
                dy = normal((m, N), BF16)
                record(f"{name} dx {m}", ops.linear_nf4_dx, dy, *w4.operands(K, *no_lora))
    return record.cases


@pytest.fixture(scope="module", params=["80", "90"])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Launch]]:
    return launches_of_cases(__file__, request.param, tmp_path_factory.mktemp("profile"))


def ratio(cases: dict[str, list[Launch]], block: int, form: tuple[str, str, str], operator: str) -> float:
    """The instructions of a form over those of NF4 with nested scales."""
    own, nf4 = (cases[f"{block} {' '.join(f)} {operator}"] for f in (form, NF4))
    assert all(launch["local_bytes"] == 0 for launch in own)
    return sum(launch.slots for launch in own) / sum(launch.slots for launch in nf4)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("block", FORMATS)
def test_formats_cost_what_nf4_costs(cases: dict[str, list[Launch]], block: int, operator: str) -> None:
    for form in FORMATS[block]:
        assert ratio(cases, block, form, operator) <= MOST[block], form


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("block", ZERO_POINTS)
def test_zero_points_cost_what_nf4_costs(cases: dict[str, list[Launch]], block: int, operator: str) -> None:
    """They are subtracted from the codes, and dX takes an FMA per weight for the product with the scale."""
    for form in ZERO_POINTS[block]:
        assert ratio(cases, block, form, operator) <= MOST_WITH_ZERO_POINTS.get(operator, MOST[block]), form


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("block", OFFSETS)
def test_offsets_stay_on_the_fast_kernels(cases: dict[str, list[Launch]], block: int, operator: str) -> None:
    """They are added to each weight in the FMA that scales it. NF4's forward in blocks of 32 is ragged."""
    for form in OFFSETS[block]:
        assert ratio(cases, block, form, operator) <= (1.15 if "forward" not in operator else MOST[block]), form


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]))))
