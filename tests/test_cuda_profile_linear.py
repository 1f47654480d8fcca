"""The work of the fused kernels on CUDA, from the kernel simulator's counters: deterministic, so they may be asserted.

Each architecture's cases run in one process of this file, which prints what each launch did. An issue slot is a warp
instruction times 32, counted per weight, over all launches of a call. bfloat16, nested scales, LoRA of rank 16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("CUDASIM_TORCH_LIBRARY" not in os.environ, reason="counters come from the kernel simulator"),
]

RANK = 16
TILE_ROWS = 128  # of w, which a CTA takes: x is read once for each
SHAPES = [(1024, 1024), (1024, 2048)]  # the sum over k of the second is split over two CTAs
TOKENS = [1, 4, 16, 64]
DX_COLUMNS = 256  # of w, which a CTA takes in dX: dy is read once for each


def run_cases(profile: Path) -> dict[str, list[dict]]:
    from samples import linear_sample

    cases = {}

    def record(name: str, operator: Callable[..., torch.Tensor], *args: object) -> None:
        before = len(profile.read_text().splitlines()) if profile.exists() else 0
        operator(*args)
        cases[name] = [json.loads(line) for line in profile.read_text().splitlines()[before:]]

    for n, k in SHAPES:
        s = linear_sample(max(TOKENS), n, k, RANK, torch.bfloat16, "cuda")
        x = s.x
        for m in TOKENS:
            s.x = x[:m].contiguous()
            dy = torch.randn(m, n).to("cuda", torch.bfloat16)
            record(f"{m} {n} {k}", torch.ops.qlora.linear_nf4, *s.args)
            record(f"dx {m} {n} {k}", torch.ops.qlora.linear_nf4_dx, dy, *s.w4.packed_args(), k, *s.lora_args)
    return cases


@pytest.fixture(scope="module", params=["80", "90"])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    profile = tmp_path_factory.mktemp("profile") / "launches.jsonl"
    run = subprocess.run(
        [sys.executable, __file__, str(profile)],
        env=os.environ | {"CUDASIM_ARCH": request.param, "CUDASIM_PROFILE": str(profile), "CUDASIM_CHECK": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(("m", "slots", "read"), [(1, 5, 1.1), (4, 5, None), (16, 6, None), (64, 9, None)])
def test_forward(cases: dict[str, Any], m: int, slots: float, read: float | None, n: int, k: int) -> None:
    launches = cases[f"{m} {n} {k}"]
    h, y = launches
    assert "skinny" in h["kernel"]
    assert y["local_bytes"] == 0
    assert sum(launch["warp_instructions"] for launch in launches) * 32 / (n * k) <= slots
    assert y["shared_wavefronts"] - y["shared_wavefronts_ideal"] <= 0.05 * y["shared_wavefronts"]
    tokens = -(-m // 16) * 16
    assert y["mma_flops"] <= 1.1 * 2 * tokens * n * (k + RANK)

    # The packed bytes once, and codes (two splits may share a sector of them) and lora_b; again for each tile of rows,
    # x and, by its four warps, h; and the sums of the splits.
    tiles, splits = n // TILE_ROWS, y["grid"][1]
    once = n * k // 2 + splits * n * k // 64 + 2 * n * RANK
    again = tiles * 2 * m * (k + 4 * RANK) + (4 * m * n * splits if splits > 1 else 0)
    assert y["global_sectors_read"] * 32 <= 1.05 * once + again
    if read:
        moved = y["global_sectors_read"] + y["global_sectors_written"]
        assert moved * 32 <= read * (y["unique_bytes_read"] + y["unique_bytes_written"])


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", TOKENS)
def test_dx(cases: dict[str, Any], m: int, n: int, k: int) -> None:
    launches = cases[f"dx {m} {n} {k}"]
    g, dx = launches
    assert "skinny" in g["kernel"]
    assert dx["local_bytes"] == 0
    assert sum(launch["warp_instructions"] for launch in launches) * 32 / (n * k) <= 10
    assert dx["shared_wavefronts"] - dx["shared_wavefronts_ideal"] <= 0.05 * dx["shared_wavefronts"]
    tokens = -(-m // 16) * 16
    assert sum(launch["mma_flops"] for launch in launches) <= 1.1 * 2 * tokens * k * (n + RANK)

    # The packed bytes and lora_a once; dy, codes and, by four warps, g again for each tile of columns; and the sums of
    # the splits, of whole tiles of tokens.
    tiles, splits = k // DX_COLUMNS, dx["grid"][1]
    again = tiles * (2 * m * n + n * k // 64 + 4 * 2 * m * RANK) + (4 * max(m, 8) * k * splits if splits > 1 else 0)
    assert dx["global_sectors_read"] * 32 <= 1.05 * (n * k // 2 + 2 * k * RANK + again)


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]))))
