"""The cost of one more block in a tile of the Hopper kernels, by the kernel simulator's counters. In the forward, a
block is 64 k of 128 rows for 128 tokens; in dX, 64 rows of 128 columns for 256 tokens. bfloat16, nested scales, and
pairs of tiles.

The simulator counts the warps' loads and stores of shared memory. The reads of wgmma and the writes of TMA are added:
tokens are read by both warpgroups and written once, packed bytes are written once, 128 bytes per pass.
"""

from __future__ import annotations

import os

import pytest
import torch

from cuda_profiles import Launch, launches_in, needs_counters, simulated

pytestmark = needs_counters

FORWARD = [(256, 8192, 1024), (256, 8192, 2048)]  # 2 x 64 tiles, one CTA each
DX = [(256, 1024, 4352), (256, 2048, 4352)]  # 34 tiles, three CTAs each
FORWARD_BLOCKS = 128 * (2048 - 1024) // 64
DX_BLOCKS = 34 * (2048 - 1024) // 64


def run_cases() -> None:
    from samples import linear_sample
    from test_linear_dx_cuda import gradient, run_dx

    os.environ["QLORA_CUDA_KERNEL"] = "sm90:tokens=128,splits=1,multicast=2"
    for m, n, k in FORWARD:
        torch.ops.qlora.linear_nf4(*linear_sample(m, n, k, None, torch.bfloat16, "cuda", bias=False).args)
    os.environ["QLORA_CUDA_KERNEL"] = "sm90:tokens=256,splits=3,multicast=2"
    for m, n, k in DX:
        s = linear_sample(m, n, k, None, torch.bfloat16, "cuda", bias=False)
        run_dx(s, gradient(s))


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[Launch]:
    profile = tmp_path_factory.mktemp("profile") / "launches.jsonl"
    simulated(__file__, "90", profile)
    found = [launch for launch in launches_in(profile) if "sm90" in launch["kernel"]]
    assert len(found) == len(FORWARD + DX)
    assert not any(launch["local_bytes"] for launch in found)
    return found


def block_of(short: Launch, long: Launch, blocks: int) -> Launch:
    """The counters of one block: the difference of two launches."""
    assert short["grid"] == long["grid"]
    numbers = {name: value for name, value in long.items() if isinstance(value, int)}
    return Launch({name: (value - short[name]) / blocks for name, value in numbers.items()})


@pytest.fixture(scope="module")
def forward(launches: list[Launch]) -> Launch:
    return block_of(*launches[:2], FORWARD_BLOCKS)


@pytest.fixture(scope="module")
def dx(launches: list[Launch]) -> Launch:
    return block_of(*launches[2:], DX_BLOCKS)


def test_issue(forward: Launch, dx: Launch) -> None:
    """Issue slots of each of a multiprocessor's four schedulers; the tensor cores need 512 and 1024 clocks."""
    assert forward["warp_instructions"] / 4 <= 292
    assert dx["warp_instructions"] / 4 <= 400


def test_shared_memory(forward: Launch, dx: Launch) -> None:
    assert forward.conflicts <= 0.02
    assert forward["shared_wavefronts"] <= 250
    assert forward["shared_wavefronts"] + 3 * 128 + 32 <= 670
    assert dx.conflicts <= 0.02
    assert dx["shared_wavefronts"] <= 460
    assert dx["shared_wavefronts"] + 3 * 256 + 32 <= 1280


def test_each_byte_is_read_once_a_pair(forward: Launch, dx: Launch) -> None:
    """Tokens and packed bytes by TMA; the other CTA of a pair reads half of the tokens. Each warp reads at most the
    sectors of its rows' scales again."""
    packed = 128 * 64 // 2
    assert forward.bytes_read <= 128 * 64 + packed + 128 * 32
    assert dx.bytes_read <= 1.05 * (256 * 64 + packed + 128 * (32 + 32))


def test_pairs_share_tokens(forward: Launch, dx: Launch) -> None:
    """Two tiles with the same tokens are computed by a pair of CTAs, each of which copies half of them to both."""
    packed = 128 * 64 // 2
    for block, tokens in ((forward, 128), (dx, 256)):
        assert 32 * block["async_sectors_read"] == tokens * 64 + packed
        assert 32 * block["async_sectors_received"] == tokens * 64 * 2 + packed


def test_outputs_are_written_in_full_sectors(launches: list[Launch]) -> None:
    for launch, (m, n, k) in zip(launches, FORWARD + DX, strict=True):
        assert launch["global_sectors_written"] * 32 == 2 * m * (k if "dx" in launch["kernel"] else n)


def test_clusters_share_the_work(launches: list[Launch]) -> None:
    """Every cluster has one pair of tiles, so the busiest one executes its share of the instructions."""
    for launch in launches:
        clusters = launch["grid"][0] // launch["cluster"][0]
        assert 1 <= launch["busiest_cluster_instructions"] * clusters / launch["warp_instructions"] <= 1.02


def test_products(forward: Launch, dx: Launch) -> None:
    assert forward["mma_flops"] == 2 * 128 * 128 * 64
    assert dx["mma_flops"] == 2 * 256 * 128 * 64


if __name__ == "__main__":
    run_cases()
