"""Results of the persistent CTAs of Hopper's kernels that compute more than one tile, alone or in pairs. There is more
work than the clusters that can be resident, so these tests run in a process of their own, where the simulated card has
8 SMs.
"""

from __future__ import annotations

import os

import pytest
import torch

from own_process import run_file

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the device is not of compute capability 9.0, which alone has wgmma",
    ),
]
HALF = [torch.bfloat16, torch.float16]

# (tokens per tile, splits, multicast, m, terms of the sum, rank). The rounds of the ring buffer per tile are odd and
# even, partial and full, and more in CTAs that add LoRA's ranks: a chunk of 128 in the forward, of 64 in dX.
FORWARD = [
    (64, 1, 1, 33, 64, None),
    (64, 2, 1, 65, 640, 130),
    (128, 8, 1, 65, 1024, 80),
    (64, 1, 2, 33, 320, 16),
    (128, 1, 2, 129, 1088, 130),
    (128, 2, 2, 257, 640, None),
    (128, 4, 2, 65, 1024, 80),
]
DX = [
    (64, 1, 1, 33, 200, None),
    (128, 1, 1, 129, 136, 80),
    (256, 3, 1, 129, 520, 80),
    (64, 1, 2, 33, 456, None),
    (128, 2, 2, 129, 328, 16),
    (256, 1, 2, 257, 136, 80),
]


def outputs(splits: int, multicast: int, token_tiles: int) -> int:
    """So many that there are more tiles or pairs than clusters with one CTA per SM. The last tile is partial, and the
    last pair has no second tile."""
    clusters = torch.cuda.get_device_properties(0).multi_processor_count // (splits * multicast)
    return 128 * multicast * (clusters // token_tiles) + 64


def run_tiles() -> None:
    from accuracy import assert_accurate
    from samples import linear_sample
    from test_linear_dx_cuda import check_dx

    for tokens, splits, multicast, m, terms, rank in FORWARD:
        os.environ["QLORA_CUDA_KERNEL"] = f"sm90:tokens={tokens},splits={splits},multicast={multicast}"
        s = linear_sample(
            m, outputs(splits, multicast, -(-m // tokens)), terms, rank, HALF[splits % 2], "cuda", bias=False
        )
        assert_accurate(torch.ops.qlora.linear_nf4(*s.args), s.forward_accuracy())
    for tokens, splits, multicast, m, terms, rank in DX:
        os.environ["QLORA_CUDA_KERNEL"] = f"sm90:tokens={tokens},splits={splits},multicast={multicast}"
        check_dx(linear_sample(m, terms, outputs(splits, multicast, -(-m // tokens)), rank, HALF[splits % 2], "cuda"))
    print("checked", len(FORWARD + DX))


def test_results_of_every_tile() -> None:
    environment = {**os.environ, "QLORA_CUDA_KERNEL": "", "CUDASIM_GPCS": "8"}
    printed = run_file(__file__, environment=environment).stdout
    assert printed.endswith(f"checked {len(FORWARD + DX)}\n")


if __name__ == "__main__":
    run_tiles()
