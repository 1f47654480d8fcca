"""The persistent CTAs of Hopper's kernels compute more than one tile, alone or in pairs, of one weight or of experts,
and so do those of Blackwell's kernels of one weight. There is more work than the clusters that can be resident, so
these tests run in a process of their own, where the simulated card has 8 SMs, and where the kernel is forced for few
tokens, too."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_cases import BF16, CAPABILITY, DX, F16, FORWARD, HALF, case
from own_process import run_file

KERNEL = {(9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(CAPABILITY)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(KERNEL is None, reason="the device is not of compute capability 9.0 or 10.x"),
]

# (tokens per tile, splits, multicast, m, terms of the sum, rank). The rounds of the ring buffer per tile are odd and
# even, partial and full, and more in CTAs that add LoRA's ranks. sm90: a chunk of 128 in the forward, of 64 in dX.
# sm100: stages and chunks of 64; eight slots in the forward, six in dX, and four in the largest tile.
TILES = {
    ("sm90", FORWARD): [
        (64, 1, 1, 33, 64, None),
        (64, 2, 1, 65, 640, 130),
        (128, 8, 1, 65, 1024, 80),
        (64, 1, 2, 33, 320, 16),
        (128, 1, 2, 129, 1088, 130),
        (128, 2, 2, 257, 640, None),
        (128, 4, 2, 65, 1024, 80),
    ],
    ("sm90", DX): [
        (64, 1, 1, 33, 200, None),
        (128, 1, 1, 129, 136, 80),
        (256, 3, 1, 129, 520, 80),
        (64, 1, 2, 33, 456, None),
        (128, 2, 2, 129, 328, 16),
        (256, 1, 2, 257, 136, 80),
    ],
    ("sm100", FORWARD): [
        (64, 1, 1, 33, 64, None),
        (64, 2, 1, 65, 640, 130),
        (128, 8, 1, 65, 1024, 80),
        (64, 1, 2, 33, 320, 16),
        (128, 1, 2, 129, 1088, 130),
        (256, 1, 1, 257, 448, 200),
        (256, 2, 2, 257, 640, None),
        (256, 4, 2, 65, 1024, 80),
    ],
    ("sm100", DX): [
        (64, 1, 1, 33, 200, None),
        (64, 1, 2, 33, 456, 130),
        (128, 1, 1, 129, 136, 80),
        (128, 2, 2, 129, 328, 16),
        (256, 3, 1, 129, 520, 200),
        (256, 1, 2, 257, 136, 80),
    ],
}
# (rows of each expert, n, k, rank, dtype): all tails of tokens and outputs, of stages (128 k, 64 n) and of chunks of
# ranks; experts without rows first, between and last; one row per expert.
EXPERTS = [
    ([0, 70, 1, 0, 130, 0], 200, 192, 80, BF16),
    ([129, 0, 0, 257, 3], 136, 320, 5, F16),
    ([300], 264, 64, None, BF16),
    ([0] * 33 + [1] * 8 + [0] * 5 + [65] + [0] * 40, 72, 128, 256, F16),
]
TILES_OF_EXPERTS = {FORWARD: [(64, 1), (128, 1), (128, 2)], DX: [(64, 2), (128, 1), (256, 1), (256, 2)]}
WRONG = [([5, 3, 9, 40], [5, 5, 9, 20]), ([-7, 2**40, -(2**62), 4], [0, 20, 20, 20]), ([9, 8, 7, 6], [9, 9, 9, 9])]


def forced(tokens: int, multicast: int = 1, splits: str = "") -> None:
    os.environ["QLORA_CUDA_KERNEL"] = f"{KERNEL}:tokens={tokens},multicast={multicast}{splits}"


def outputs(splits: int, multicast: int, token_tiles: int) -> int:
    """So many that there are more tiles or pairs than clusters with one CTA per SM. The last tile is partial, and the
    last pair has no second tile."""
    clusters = torch.cuda.get_device_properties(0).multi_processor_count // (splits * multicast)
    return 128 * multicast * (clusters // token_tiles) + 64


def check_tiles() -> None:
    from operator_results import RESULTS, check_samples

    for op in (FORWARD, DX):
        for tokens, splits, multicast, m, terms, rank in TILES[str(KERNEL), op]:
            forced(tokens, multicast, f",splits={splits}")
            many = outputs(splits, multicast, -(-m // tokens))
            n, k = (many, terms) if op == FORWARD else (terms, many)
            check_samples(RESULTS[op], case(op, m, n, k, rank, HALF[splits % 2], bias=False).sample, 0)


def check_experts(s: Any) -> None:
    from accuracy import assert_accurate

    ends, dy = s.unassigned().start, s.dy()
    accuracy = {FORWARD: s.forward_accuracy(), DX: s.dx_accuracy(dy)}
    for op, tiles in TILES_OF_EXPERTS.items():
        results: list[Tensor] = []
        for tile in tiles:
            forced(*tile)
            results.append(s.forward() if op == FORWARD else s.dx(dy))
            assert_accurate(results[-1][:ends], accuracy[op])
            assert not results[-1][ends:].any()
            assert torch.equal(results[0], results[-1])  # a token's sum has the same order in all tiles


def check_stacks() -> None:
    from grouped_samples import grouped_sample
    from qlora_ext.form import Form

    for counts, n, k, rank, dtype in EXPERTS:
        check_experts(grouped_sample(counts, n, k, rank, dtype, "cuda", bias=rank != 5, dropout_p=0.2))

    # Every form of scales; an expert's scales may begin at an odd code, and it may have its own table.
    for form in (None, Form(scales="float32"), Form("int4", "bfloat16", 128), Form("e2m1", "table8", 64)):
        s = grouped_sample([3, 0, 66, 30], 40, 192, None, BF16, "cuda", form=form, block_size=128, code="fp4")
        if form is not None and form.scales == "table8":
            for e, w in enumerate(s.weights):
                w.scale_table.mul_(e + 1)
            s.__post_init__()
        check_experts(s)

    for wrong, taken_for in WRONG:
        s = grouped_sample([2, 3, 0, 15], 40, 128, 4, BF16, "cuda", dropout_p=0.2, unassigned=0)
        forced(64)
        a, b = (torch.tensor(offsets, device="cuda") for offsets in (wrong, taken_for))
        assert torch.equal(s.forward(a), s.forward(b))
        assert torch.equal(s.dx(s.dy(), a), s.dx(s.dy(), b))

    s = grouped_sample([4, 0, 9, 7], 40, 128, 8, BF16, "cuda", dropout_p=0.2)
    dy = s.dy()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = s.forward(), s.dx(dy)
    for counts in ([0, 20, 0, 0], [0, 0, 0, 0]):
        s.offsets.copy_(torch.tensor(counts).cumsum(0))
        graph.replay()
        assert all(map(torch.equal, captured, (s.forward(), s.dx(dy))))


CHECKS = {"tiles": check_tiles, "stacks": check_stacks}


@pytest.mark.parametrize("what", CHECKS if KERNEL == "sm90" else ["tiles"])
def test_results_of_every_tile(what: str) -> None:
    environment = {**os.environ, "QLORA_CUDA_KERNEL": str(KERNEL), "CUDASIM_GPCS": "8"}
    assert run_file(__file__, what, environment=environment).stdout.endswith(f"checked {what}\n")


if __name__ == "__main__":
    import sys

    CHECKS[sys.argv[1]]()
    print("checked", sys.argv[1])
