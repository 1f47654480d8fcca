"""What a training step of a 4096 x 4096 layer moves and launches on CUDA, from the kernel simulator's counters.

4096 tokens, bfloat16, nested scales, LoRA of rank 16; on Hopper, whose own kernels take them however many they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("CUDASIM_TORCH_LIBRARY" not in os.environ, reason="counters come from the kernel simulator"),
]

RANK = 16
M = N = K = 4096


def run_step() -> None:
    from samples import linear_sample

    s = linear_sample(M, N, K, RANK, torch.bfloat16, "cuda", bias=False, requires_grad=True)
    y = torch.ops.qlora.linear_nf4(*s.args)
    torch.autograd.grad(y, s.differentiable, torch.ones_like(y))


@pytest.mark.slow
def test_a_step_writes_its_outputs_and_little_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    profile = tmp_path_factory.mktemp("profile") / "launches.jsonl"
    simulator = {"CUDASIM_ARCH": "90", "CUDASIM_PROFILE": str(profile), "CUDASIM_CHECK": ""}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env={**os.environ, **simulator}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    launches = [json.loads(line) for line in profile.read_text().splitlines()]
    launches = [
        launch for launch in launches if "quantize" not in launch["kernel"] and "absmax" not in launch["kernel"]
    ]
    assert len(launches) <= 8, [launch["kernel"] for launch in launches]
    outputs = 2 * (M * N + M * K + RANK * (N + K))
    written = sum(launch["unique_bytes_written"] for launch in launches)
    assert outputs <= written <= outputs + 0.05 * 2 * N * K
    assert sum("sm90" in launch["kernel"] for launch in launches) == 2


if __name__ == "__main__":
    run_step()
