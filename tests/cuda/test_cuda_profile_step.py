"""Memory traffic and launches of a training step of a 4096 x 4096 layer on CUDA, by the kernel simulator's counters.

4096 tokens, bfloat16, nested scales, LoRA of rank 16. The Hopper kernels take any number of tokens. On B200 the library
multiplies. LoRA's products are further terms of its sums, for which x and dy are copied, and the whole decoded weight
stays in L2. On A100 our own GEMM multiplies by the panels, without sums in memory. It runs at a smaller size here,
because the simulator would take minutes: one panel, where the size above takes two (test_cuda_choices.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from cuda_profiles import Launch, launches_in, needs_counters, simulated

pytestmark = needs_counters

RANK = 16
SIZE = (4096, 4096, 4096)
SMALL = (8960, 256, 256)  # fills an A100


def run_step() -> None:
    from samples import linear_sample

    m, n, k = map(int, os.environ["STEP_SIZE"].split())
    s = linear_sample(m, n, k, RANK, torch.bfloat16, "cuda", bias=False, requires_grad=True)
    y = torch.ops.qlora.linear_nf4(*s.args)
    torch.autograd.grad(y, s.differentiable, torch.ones_like(y))


def launches_of_a_step(arch: str, profile: Path, size: tuple[int, int, int] = SIZE) -> list[Launch]:
    """The launches of our kernels. The simulator does not count the library's."""
    simulated(__file__, arch, profile, STEP_SIZE=" ".join(map(str, size)))
    preparation = re.compile("quantize_nf4_kernel|quantize_absmax|absmax_sum")
    launches = launches_in(profile)
    return [launch for launch in launches if not preparation.search(launch["kernel"].replace("dequantize_nf4", ""))]


def written(launches: list[Launch]) -> int:
    return sum(launch["unique_bytes_written"] for launch in launches)


@pytest.mark.slow
def test_a_step_writes_its_outputs_and_little_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    launches = launches_of_a_step("90", tmp_path_factory.mktemp("profile") / "launches.jsonl")
    low_rank = [launch for launch in launches if "low_rank" in launch["kernel"]]
    assert len(low_rank) == 2  # h and g once each
    assert len(launches) == 5, [launch["kernel"] for launch in launches]
    m, n, k = SIZE
    outputs = 2 * (m * n + m * k + RANK * (n + k))
    assert outputs <= written(launches) <= outputs + 0.05 * 2 * n * k
    assert sum("sm90" in launch["kernel"] for launch in launches) == 2
    in_order = [launch["kernel"] for launch in launches if not launch["dependent"]]
    assert len(in_order) == 2  # the others may start early
    assert all("low_rank" in kernel for kernel in in_order)


@pytest.mark.slow
def test_a_step_by_our_gemm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """It writes the weight once per direction, its outputs, h and g, and nothing else."""
    launches = launches_of_a_step("80", tmp_path_factory.mktemp("profile") / "launches.jsonl", SMALL)
    kernels = [launch["kernel"] for launch in launches]
    counts = {name: sum(name in kernel for kernel in kernels) for name in ("low_rank_kernel", "dequantize", "gemm")}
    assert counts == {"low_rank_kernel": 2, "dequantize": 2, "gemm": 2}, kernels
    assert len(launches) == 7, kernels  # and dlora
    m, n, k = SMALL
    ours = [launch for launch in launches if "dlora" not in launch["kernel"]]
    assert written(ours) == 2 * (m * n + m * k) + 2 * 2 * n * k + 2 * 2 * m * RANK
    assert all(launch.conflicts == 0 for launch in ours if "gemm" in launch["kernel"])


@pytest.mark.slow
def test_a_step_by_the_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    launches = launches_of_a_step("100", tmp_path_factory.mktemp("profile") / "launches.jsonl")
    kernels = [launch["kernel"] for launch in launches]
    counts = {name: sum(name in kernel for kernel in kernels) for name in ("low_rank_kernel", "dequantize", "update")}
    assert counts == {"low_rank_kernel": 2, "dequantize": 2, "update": 0}, kernels
    assert len(launches) == 5  # and dlora
    m, n, k = SIZE
    # For y and for dx, the decoded weight and the other operand, with LoRA's terms; what the library writes is not
    # counted. Besides that h, g and the gradients of LoRA's weights.
    operands = 2 * 2 * n * k + 2 * (m * k + m * n) + 2 * RANK * (2 * m + n + k)
    least = operands + 2 * RANK * (2 * m + n + k)
    assert least <= written(launches) <= least + 0.05 * 2 * n * k  # the sums of dlora's splits


if __name__ == "__main__":
    run_step()
    # Without the interpreter's own exit: torch's thread for the backward may still be freeing its results, and a thread
    # that then waits for the interpreter ends the process with an error.
    os._exit(0)
