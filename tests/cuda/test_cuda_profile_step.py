"""What a training step of a 4096 x 4096 layer moves and launches on CUDA, from the kernel simulator's counters.

4096 tokens, bfloat16, nested scales, LoRA of rank 16. Hopper's own kernels take them however many they are. Elsewhere
the library multiplies, whose float32 sums LoRA is added to before they are rounded, once: a panel of the decoded weight
and its sums stay in L2, so there are as many panels as that makes it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cuda_profiles import Launch, launches_in, needs_counters, simulated

pytestmark = needs_counters

RANK = 16
M = N = K = 4096


def run_step() -> None:
    from samples import linear_sample

    s = linear_sample(M, N, K, RANK, torch.bfloat16, "cuda", bias=False, requires_grad=True)
    y = torch.ops.qlora.linear_nf4(*s.args)
    torch.autograd.grad(y, s.differentiable, torch.ones_like(y))


def launches_of_a_step(arch: str, profile: Path) -> list[Launch]:
    """Our kernels; the library's are not the simulator's to count."""
    simulated(__file__, arch, profile)
    preparation = re.compile("quantize_nf4_kernel|quantize_absmax|absmax_sum")
    launches = launches_in(profile)
    return [launch for launch in launches if not preparation.search(launch["kernel"].replace("dequantize_nf4", ""))]


def written(launches: list[Launch]) -> int:
    return sum(launch["unique_bytes_written"] for launch in launches)


@pytest.mark.slow
def test_a_step_writes_its_outputs_and_little_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    launches = launches_of_a_step("90", tmp_path_factory.mktemp("profile") / "launches.jsonl")
    low_rank = [launch for launch in launches if "low_rank" in launch["kernel"]]
    assert len(low_rank) == 2  # h and g, once each
    assert len(launches) == 5, [launch["kernel"] for launch in launches]
    outputs = 2 * (M * N + M * K + RANK * (N + K))
    assert outputs <= written(launches) <= outputs + 0.05 * 2 * N * K
    assert sum("sm90" in launch["kernel"] for launch in launches) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "panels"), [("80", 4), ("100", 2)])
def test_a_step_by_the_library(arch: str, panels: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    launches = launches_of_a_step(arch, tmp_path_factory.mktemp("profile") / "launches.jsonl")
    kernels = [launch["kernel"] for launch in launches]
    counts = {name: sum(name in kernel for kernel in kernels) for name in ("low_rank_kernel", "dequantize", "update")}
    assert counts == {"low_rank_kernel": 2, "dequantize": 2 * panels, "update": 2 * panels}, kernels
    assert len(launches) == 3 + 4 * panels
    outputs = 2 * (M * N + M * K + RANK * (N + K))
    decoded = 2 * 2 * N * K  # in panels, for y and for dx
    assert outputs <= written(launches) <= outputs + decoded + 0.05 * 2 * N * K


if __name__ == "__main__":
    run_step()
