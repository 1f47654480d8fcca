"""The forward and dX of experts with Hopper's instructions. Tests run in a process of their own, where the simulated
card has 8 SMs, so each persistent CTA computes several tiles, and where the kernel is forced for few tokens, too."""

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
BF16, F16 = torch.bfloat16, torch.float16

# (rows of each expert, n, k, rank, dtype): all tails of tokens and outputs, of stages (128 k, 64 n) and of chunks of
# ranks; experts without rows first, between and last; one row per expert.
CASES = [
    ([0, 70, 1, 0, 130, 0], 200, 192, 80, BF16),
    ([129, 0, 0, 257, 3], 136, 320, 5, F16),
    ([300], 264, 64, None, BF16),
    ([0] * 33 + [1] * 8 + [0] * 5 + [65] + [0] * 40, 72, 128, 256, F16),
]
WRONG = [([5, 3, 9, 40], [5, 5, 9, 20]), ([-7, 2**40, -(2**62), 4], [0, 20, 20, 20]), ([9, 8, 7, 6], [9, 9, 9, 9])]


def forced(tokens: int, multicast: int = 1) -> None:
    os.environ["QLORA_CUDA_KERNEL"] = f"sm90:tokens={tokens},multicast={multicast}"


def check_forward(s) -> None:
    from accuracy import assert_accurate

    ends, results = s.unassigned().start, []
    for tokens, multicast in ((64, 1), (128, 1), (128, 2)):
        forced(tokens, multicast)
        y = s.forward()
        assert_accurate(y[:ends], s.forward_accuracy())
        assert not y[ends:].any()
        results.append(y)
    assert all(torch.equal(results[0], y) for y in results[1:])  # a token's sum has the same order in all tiles


def check_dx(s) -> None:
    from accuracy import assert_accurate

    ends, dy, results = s.unassigned().start, s.dy(), []
    for tokens, multicast in ((64, 2), (128, 1), (256, 1), (256, 2)):
        forced(tokens, multicast)
        dx = s.dx(dy)
        assert_accurate(dx[:ends], s.dx_accuracy(dy))
        assert not dx[ends:].any()
        results.append(dx)
    assert all(torch.equal(results[0], dx) for dx in results[1:])


def check_all() -> None:
    from grouped_samples import grouped_sample
    from qlora_ext.form import Form

    for counts, n, k, rank, dtype in CASES:
        s = grouped_sample(counts, n, k, rank, dtype, "cuda", bias=rank != 5, dropout_p=0.2)
        check_forward(s)
        check_dx(s)

    # Every form of scales; an expert's scales may begin at an odd code, and it may have its own table.
    for form in (None, Form(scales="float32"), Form("int4", "bfloat16", 128), Form("e2m1", "table8", 64)):
        s = grouped_sample([3, 0, 66, 30], 40, 192, None, BF16, "cuda", form=form, block_size=128, code="fp4")
        if form is not None and form.scales == "table8":
            for e, w in enumerate(s.weights):
                w.scale_table.mul_(e + 1)
            s.__post_init__()
        check_forward(s)
        check_dx(s)

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
    print("checked")


def test_results_of_every_tile() -> None:
    environment = {**os.environ, "QLORA_CUDA_KERNEL": "sm90", "CUDASIM_GPCS": "8"}
    assert run_file(__file__, environment=environment).stdout.endswith("checked\n")


if __name__ == "__main__":
    check_all()
