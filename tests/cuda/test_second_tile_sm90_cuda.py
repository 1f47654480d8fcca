"""Results of the persistent CTAs of Hopper's kernels that compute more than one tile. There is one tile more than the
clusters that can be resident, so these tests run in a process of their own, where the simulated card has 8 SMs.
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

# (tokens per tile, splits, m, terms of the sum, rank). The rounds of the ring buffer per tile are odd and even, partial
# and full, and more in CTAs that add LoRA's ranks: a chunk of 128 in the forward, of 64 in dX.
FORWARD = [(64, 1, 33, 64, None), (64, 2, 65, 640, 130), (128, 8, 65, 1024, 80)]
DX = [(64, 1, 33, 200, None), (128, 1, 129, 136, 80), (256, 3, 129, 520, 80)]


def outputs(splits: int, token_tiles: int) -> int:
    """So many that there are more tiles than clusters with one CTA per SM; the last tile is partial."""
    clusters = torch.cuda.get_device_properties(0).multi_processor_count // splits
    return 128 * (clusters // token_tiles) + 64


def run_tiles() -> None:
    from accuracy import assert_accurate
    from samples import linear_sample
    from test_linear_dx_cuda import check_dx

    for tokens, splits, m, terms, rank in FORWARD:
        os.environ["QLORA_CUDA_KERNEL"] = f"sm90:tokens={tokens},splits={splits}"
        s = linear_sample(m, outputs(splits, -(-m // tokens)), terms, rank, HALF[splits % 2], "cuda", bias=False)
        assert_accurate(torch.ops.qlora.linear_nf4(*s.args), s.forward_accuracy())
    for tokens, splits, m, terms, rank in DX:
        os.environ["QLORA_CUDA_KERNEL"] = f"sm90:tokens={tokens},splits={splits}"
        check_dx(linear_sample(m, terms, outputs(splits, -(-m // tokens)), rank, HALF[splits % 2], "cuda"))
    print("checked", len(FORWARD + DX))


def test_results_of_every_tile() -> None:
    environment = {**os.environ, "QLORA_CUDA_KERNEL": "", "CUDASIM_GPCS": "8"}
    printed = run_file(__file__, environment=environment).stdout
    assert printed.endswith(f"checked {len(FORWARD + DX)}\n")


if __name__ == "__main__":
    run_tiles()
