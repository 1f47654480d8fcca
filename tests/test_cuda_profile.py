"""The work that the CUDA kernels do, from the kernel simulator's counters: deterministic, so they may be asserted.

Each architecture's cases run in one process of this file, which prints what each launch did. An issue slot is a warp
instruction times 32, counted per weight. Ideal traffic is every distinct byte moved once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("CUDASIM_TORCH_LIBRARY" not in os.environ, reason="counters come from the kernel simulator"),
]

N = K = 1024
RANK = 16
WEIGHTS = N * K
PACKED_BYTES = WEIGHTS // 2


class Launch(dict):
    """One launch's counters."""

    @property
    def slots(self) -> float:
        return self["warp_instructions"] * 32 / WEIGHTS

    @property
    def bytes_read(self) -> int:
        return self["global_sectors_read"] * 32

    @property
    def moved(self) -> float:
        """Sectors moved over the least there could be."""
        sectors = self["global_sectors_read"] + self["global_sectors_written"]
        return sectors * 32 / (self["unique_bytes_read"] + self["unique_bytes_written"])

    @property
    def conflicts(self) -> float:
        """Share of shared memory wavefronts due to bank conflicts."""
        return 1 - self["shared_wavefronts_ideal"] / max(self["shared_wavefronts"], 1)


def run_cases(profile: Path) -> dict[str, Any]:
    from samples import linear_sample, relative_error

    ops = torch.ops.qlora

    def launches(call: Any) -> tuple[Any, list[dict]]:
        written = len(profile.read_text().splitlines())
        out = call()
        lines = profile.read_text().splitlines()
        return out, [json.loads(line) for line in lines[written:]]

    profile.touch()
    w = (torch.randn(N, K) * 0.02).to("cuda", torch.bfloat16)
    cases: dict[str, Any] = {}
    (packed, absmax), cases["quantize"] = launches(lambda: ops.quantize_nf4(w, 64))
    scales, _ = launches(lambda: ops.quantize_absmax(absmax, 256))
    _, cases["dequantize"] = launches(lambda: ops.dequantize_nf4(packed, *scales, 64, 256, [N, K], torch.bfloat16))
    for m in (1, 4, 16, 64):
        s = linear_sample(m=m, n=N, k=K, rank=RANK, dtype=torch.bfloat16, device="cuda", bias=False)
        y, cases[f"linear {m}"] = launches(lambda s=s: ops.linear_nf4(*s.args))
        cases[f"linear {m} error"] = relative_error(y, s.expected())
        cases[f"linear {m} plain error"] = relative_error(_rounded_linear(s), s.expected())
        cases[f"linear {m} rounding"] = relative_error(torch.from_numpy(s.expected()).to(torch.bfloat16), s.expected())
    s = linear_sample(m=64, n=N, k=K, rank=RANK, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(64, N).to("cuda", torch.bfloat16)
    dx, cases["dx 64"] = launches(lambda: ops.linear_nf4_dx(dy, *s.w4.packed_args(), K, *s.lora_args))
    cases["dx 64 error"] = relative_error(dx, s.expected_dx(dy))
    return cases


def _rounded_linear(s: Any) -> torch.Tensor:
    """Dequantize to bfloat16 and multiply, LoRA apart, sums in float32: what users do without a fused kernel."""
    w = torch.from_numpy(s.decoded()).to(torch.bfloat16).float()
    x, a, b = (t.cpu().float() for t in (s.x, s.lora_a, s.lora_b))
    h = (x @ a.T).to(torch.bfloat16).float()
    base = (x @ w.T).to(torch.bfloat16)
    return base + ((h @ b.T).to(torch.bfloat16) * s.scaling)


@pytest.fixture(scope="module", params=["80", "90"])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    profile = tmp_path_factory.mktemp("profile") / "launches.jsonl"
    run = subprocess.run(
        [sys.executable, __file__, str(profile)],
        env=os.environ | {"CUDASIM_ARCH": request.param, "CUDASIM_PROFILE": str(profile), "CUDASIM_CHECK": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    return {k: [Launch(launch) for launch in v] if isinstance(v, list) else v for k, v in found.items()}


def main_launch(cases: dict[str, Any], case: str, at_most: int) -> Launch:
    """The launch that reads the packed weight; there are `at_most` launches in all."""
    assert len(cases[case]) <= at_most, [launch["kernel"] for launch in cases[case]]
    return max(cases[case], key=lambda launch: launch["warp_instructions"])


def test_dequantize(cases: dict[str, Any]) -> None:
    launch = main_launch(cases, "dequantize", 1)
    assert launch.moved <= 1.02
    assert launch.bytes_read <= 1.02 * launch["unique_bytes_read"]
    assert launch.slots <= 7
    assert launch.conflicts <= 0.05


def test_quantize(cases: dict[str, Any]) -> None:
    launch = main_launch(cases, "quantize", 1)
    assert launch.moved <= 1.02
    assert launch.slots <= 16
    assert launch.conflicts == 0


# tokens: issue slots a weight of all launches together, at most
LINEAR_SLOTS = {1: 5, 4: 5, 16: 6, 64: 9}


@pytest.mark.parametrize("m", LINEAR_SLOTS)
def test_linear(cases: dict[str, Any], m: int) -> None:
    launch = main_launch(cases, f"linear {m}", 2)
    assert sum(one.slots for one in cases[f"linear {m}"]) <= LINEAR_SLOTS[m]
    assert launch.conflicts <= 0.05
    assert launch["mma_flops"] <= 1.1 * 2 * max(m, 16) * N * (K + RANK)
    if m == 1:
        assert launch.moved <= 1.1
    check_packed_is_read_once(launch, m * K)
    # The rounding of y itself is nobody's fault: what is compared is the error beyond it.
    assert beyond_rounding(cases, f"linear {m} error") <= 0.5 * beyond_rounding(cases, f"linear {m} plain error")


def test_linear_dx(cases: dict[str, Any]) -> None:
    launch = main_launch(cases, "dx 64", 2)
    assert sum(one.slots for one in cases["dx 64"]) <= 10
    assert launch.conflicts <= 0.05
    assert launch["mma_flops"] <= 1.1 * 2 * 64 * K * (N + RANK)
    check_packed_is_read_once(launch, 64 * N)


def check_packed_is_read_once(launch: Launch, dense: int) -> None:
    """Besides what each tile reads of x or dy anew, and partial sums, no second copy of the packed weight is read."""
    tiles = launch["grid"][0]
    dense_bytes = tiles * dense * 2
    partial_bytes = launch["unique_bytes_written"]
    assert launch.bytes_read - dense_bytes - partial_bytes <= 1.3 * PACKED_BYTES


def beyond_rounding(cases: dict[str, Any], name: str) -> float:
    rounding = cases[name.split(" plain")[0].removesuffix(" error") + " rounding"]
    return max(cases[name] ** 2 - rounding**2, 0.0) ** 0.5


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]))))
