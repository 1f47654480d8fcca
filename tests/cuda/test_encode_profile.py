"""The work of the search for scales and of encoding on CUDA, by the kernel simulator's counters. As in
test_cuda_profile.py, the cases run in one process of this file, which prints what each launch did.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_ext  # noqa: F401  (its operators)
from cuda_profiles import Launch, Recorder, launches_of_cases, needs_counters

pytestmark = needs_counters

N, K, BLOCK = 64, 512, 64
BATCH = 128  # columns that are rounded together, in registers
ROWS = 8  # rows of a CTA, for so few rows
SEARCH_SLOTS = 800  # issue slots per weight, for 31 candidates
ENCODE_SLOTS = 16
STOCHASTIC_SLOTS = 40


def run_cases(profile: Path) -> dict[str, Any]:
    ops = torch.ops.qlora
    w = torch.randn(N, K).to("cuda", torch.bfloat16)
    factors = (torch.eye(K) + 0.01 * torch.randn(K, K).triu(1)).cuda()
    absmax = torch.rand(N * K // BLOCK).cuda() + 0.5
    calls = {
        "search": lambda: ops.search_absmax_nf4(w, torch.rand(K).cuda(), BLOCK),
        "encode": lambda: ops.encode_nf4(w, absmax, BLOCK),
        "stochastic": lambda: ops.encode_nf4_stochastic(w, absmax, BLOCK, 0),
        "feedback": lambda: ops.encode_nf4(w, absmax, BLOCK, factors, torch.arange(K).cuda()),
    }
    record = Recorder(profile)
    for name, call in calls.items():
        record(name, call)
    return record.cases


@pytest.fixture(scope="module", params=["80", "90"])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    found = launches_of_cases(__file__, request.param, tmp_path_factory.mktemp("profile"))
    assert all(len(launches) == 1 for launches in found.values())
    return {name: launches[0] for name, launches in found.items()}


@pytest.mark.parametrize("name", ["search", "encode", "stochastic", "feedback"])
def test_no_local_memory_and_no_bank_conflicts(cases: dict[str, Launch], name: str) -> None:
    assert cases[name]["local_bytes"] == 0
    assert cases[name].conflicts <= 0.01


def test_search(cases: dict[str, Launch]) -> None:
    launch = cases["search"]
    assert launch.slots <= SEARCH_SLOTS * N * K
    assert launch["global_sectors_read"] <= 1.02 * launch["global_sectors_read_ideal"]


@pytest.mark.parametrize(("name", "slots"), [("encode", ENCODE_SLOTS), ("stochastic", STOCHASTIC_SLOTS)])
def test_encode(cases: dict[str, Launch], name: str, slots: int) -> None:
    launch = cases[name]
    assert launch.slots <= slots * N * K
    assert launch.bytes_read <= 1.1 * N * K * (2 + 4 / BLOCK * 4)  # a block's scale is read with each of its loads
    assert launch["global_sectors_written"] * 32 <= 1.02 * launch["unique_bytes_written"]


def test_feedback(cases: dict[str, Launch]) -> None:
    """A product and a difference per pair of columns; the pairs within a batch count twice, and are rounded."""
    launch = cases["feedback"]
    batches = K // BATCH
    assert launch["fp32"] * 32 <= 1.02 * N * K * (K + BATCH) + 20 * N * K * 32 / 4  # a warp rounds 4 rows at once
    # Each CTA reads the factors of a batch and all before it, the errors before it, order and diagonal; and weights and
    # scales, and the codes again, once.
    factors = N // ROWS * 4 * BATCH**2 * batches * (batches + 1) // 2
    errors = N * 4 * BATCH * batches * (batches - 1) // 2
    places = N // ROWS * K * (8 + 32)
    assert launch.bytes_read <= 1.05 * (factors + errors + places + N * K * (2 + 4 + 1))


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]))))
