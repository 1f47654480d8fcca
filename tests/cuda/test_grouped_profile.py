"""The work of the operators over experts on CUDA, by the kernel simulator's counters, for 3 experts with rows and an
increasing number without. As in test_cuda_profile.py, the cases run in one process of this file, which prints the
counters of each launch.
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

EXPERTS = [8, 64, 128]
ROWS = {1: 5, 3: 12, 6: 40}  # rows of the experts that have any
N, K, RANK = 384, 512, 16
MANY_ROWS = [1500, 31, 0, 1569]  # of experts with N = 8
TABLES = 4096  # bytes of constants
OPERATORS = {"forward": 2, "dx": 2, "dlora": 3}  # and their launches


def run_cases(profile: Path) -> dict[str, Any]:
    from grouped_samples import grouped_sample

    record = Recorder(profile)
    for experts in EXPERTS:
        counts = [ROWS.get(e, 0) for e in range(experts)]
        s = grouped_sample(counts, N, K, RANK, torch.bfloat16, "cuda", dropout_p=0.1, unassigned=0)
        dy = s.dy()
        for name, run, args in (("forward", s.forward, ()), ("dx", s.dx, (dy,)), ("dlora", s.dlora, (dy,))):
            record(f"{name} {experts}", run, *args)
    many = grouped_sample(MANY_ROWS, 8, K, RANK, torch.bfloat16, "cuda", dropout_p=0.1, unassigned=0)
    record("many rows", many.forward)
    return record.cases


@pytest.fixture(scope="module", params=["80", "90"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cases(arch: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Launch]]:
    return launches_of_cases(__file__, arch, tmp_path_factory.mktemp("profile"))


@pytest.mark.parametrize("name", OPERATORS)
def test_launches_do_not_grow_with_the_experts(cases: dict[str, list[Launch]], name: str) -> None:
    for experts in EXPERTS:
        launches = cases[f"{name} {experts}"]
        assert len(launches) == OPERATORS[name]
        assert all("grouped" in launch["kernel"] for launch in launches)
        assert all(launch["local_bytes"] == 0 for launch in launches)


def test_from_hopper_on_the_kernel_behind_a_low_rank_product_starts_early(
    cases: dict[str, list[Launch]], arch: str
) -> None:
    for name in OPERATORS:
        for launch in cases[f"{name} {EXPERTS[0]}"]:
            assert launch["dependent"] == (arch == "90" and "low_rank" not in launch["kernel"]), launch["kernel"]


@pytest.mark.parametrize("name", ["forward", "dx"])
def test_of_idle_experts_nothing_is_read(cases: dict[str, list[Launch]], name: str) -> None:
    """The packed bytes, codes and adapters of the 3 experts, the rows, and one offset per expert."""
    rows, given, made = sum(ROWS.values()), *((K, N) if name == "forward" else (N, K))
    for experts in EXPERTS:
        low_rank, main = cases[f"{name} {experts}"]
        weights = len(ROWS) * (N * K // 2 + N * K // 64 + 4 * (N * K // 64 // 256 + 1 + 1) + 2 * RANK * made)
        assert main["unique_bytes_read"] <= weights + 2 * rows * (given + RANK) + 8 * experts + TABLES
        assert low_rank["unique_bytes_read"] <= 2 * (rows + RANK * len(ROWS)) * given + 8 * experts


@pytest.mark.parametrize("name", OPERATORS)
def test_idle_experts_cost_only_the_look_at_their_offsets(cases: dict[str, list[Launch]], name: str) -> None:
    """Zeros are written for their gradients. The tiles are the same for 64 and 128 experts."""
    few, many = (sum(launch.slots for launch in cases[f"{name} {experts}"]) for experts in EXPERTS[1:])
    zeros = 64 * RANK * (N + K) if name == "dlora" else 0
    assert many <= 1.1 * few + 30 * zeros


def test_of_many_rows_a_is_read_once_per_32(cases: dict[str, list[Launch]]) -> None:
    low_rank, _ = cases["many rows"]
    tiles = sum(-(-rows // 32) for rows in MANY_ROWS)
    assert low_rank.bytes_read <= 1.02 * 2 * K * (sum(MANY_ROWS) + RANK * tiles)


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]))))
