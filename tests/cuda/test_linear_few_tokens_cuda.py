"""The forward for up to 16 tokens on CUDA, which also computes LoRA's h: compared with the oracle at all boundaries of
tiles, slices of k and ranks, and repeatable on any stream and in graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import accuracy
from accuracy import assert_accurate
from samples import LinearSample, linear_sample, rows, to_f64

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora
HALF = [torch.bfloat16, torch.float16]


def run(s: LinearSample) -> Tensor:
    return OPS.linear_nf4(*s.args)


def check(*samples: LinearSample) -> None:
    """Checks all samples together, because errors of a few outputs vary by chance."""
    results = [(run(s), s.forward_accuracy()) for s in samples]
    y, expected = zip(*results, strict=True)
    assert_accurate(torch.cat(y), accuracy.concatenate(expected))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("m", range(1, 17))
def test_every_number_of_tokens(m: int, dtype: torch.dtype) -> None:
    check(linear_sample(m, 200, 448, rank=16, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("m", [3, 8, 16])
@pytest.mark.parametrize("n", [1, 8, 63, 65, 127, 129])
def test_rows_end_anywhere(m: int, n: int) -> None:
    seeds = range(-(-200 // (m * n)))
    check(*(linear_sample(m, n, 192, rank=8, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in seeds))


@pytest.mark.parametrize("m", [2, 7, 13])
@pytest.mark.parametrize("k", [64, 128, 512, 576, 1024, 1088, 1600, 2112])
def test_slices_of_k_end_anywhere(m: int, k: int) -> None:
    """In one segment of a unit, in one of the alternating groups, in a stage, in the last of several CTAs."""
    for rank in (None, 16):
        check(linear_sample(m, 72, k, rank=rank, dtype=torch.bfloat16, device="cuda", double_quant=k % 128 == 0))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rank", [0, 1, 5, 8, 15, 16, 17, 24, 32, 33, 64])
@pytest.mark.parametrize("m", [1, 6, 16])
def test_every_rank_with_dropout(m: int, rank: int, dtype: torch.dtype) -> None:
    samples = [
        linear_sample(m, 136, 320, rank, dtype, "cuda", bias=rank % 2 == 0, dropout_p=p, seed=seed)
        for seed, p in enumerate((0.0, 0.3, 0.3))
    ]
    check(*samples)


@pytest.mark.parametrize("m", [4, 16])
def test_a_wide_model_without_a_split(m: int) -> None:
    """More rows than multiprocessors, so that every CTA has several stages."""
    s = linear_sample(m, 128 * 140, 640, rank=4, dtype=torch.bfloat16, device="cuda", block_size=128)
    y, expected = run(s), s.forward_accuracy()
    assert_accurate(y, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_parts_of_h_beyond_the_range_of_h(dtype: torch.dtype) -> None:
    """Slices of k cancel: partial sums must not be rounded to float16, whose largest number is 65504."""
    s = linear_sample(2, 64, 4096, rank=16, dtype=dtype, device="cuda")
    s.x[:, :2048], s.x[:, 2048:] = 100.0, -100.0
    s.lora_a[:] = 1.0
    s.lora_a[:, 0] += torch.arange(16).to(s.lora_a) / 8
    s.lora_b *= 0.01
    check(s)
    parts = to_f64(s.x)[:, :2048] @ to_f64(s.lora_a).T[:2048]
    assert abs(parts).min() > torch.finfo(torch.float16).max


def test_h_is_more_exact_than_the_formula() -> None:
    s = linear_sample(8, 256, 512, rank=16, dtype=torch.float16, device="cuda", bias=False)
    s.w4.absmax.zero_()
    s.w4.nested_absmax.zero_()
    s.w4.nested_offset.zero_()
    expected = s.forward_accuracy()
    h = to_f64(s.x) @ to_f64(s.lora_a).T * s.scaling
    assert abs(h @ to_f64(s.lora_b).T - expected.exact).max() < 1e-9
    once = accuracy.rounded(expected.exact, torch.float16)
    assert (rows(run(s)) == once).mean() > 0.99


@pytest.mark.parametrize("m", [1, 16])
def test_lora_a_that_is_not_aligned(m: int) -> None:
    s = linear_sample(m, 64, 256, 6, torch.bfloat16, "cuda")
    s.lora_a = (
        torch.empty(s.lora_a.numel() + 1, dtype=s.lora_a.dtype, device="cuda")[1:].view_as(s.lora_a).copy_(s.lora_a)
    )
    check(s)


@pytest.mark.parametrize("m", [1, 7, 16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_nonfinite_values_stay_in_their_token(m: int, bad: float) -> None:
    s = linear_sample(m, 72, 320, 16, torch.bfloat16, "cuda")
    expected = run(s)
    s.x[m // 2, 69] = bad
    y = run(s)
    assert not y[m // 2].isfinite().any()
    others = [i for i in range(m) if i != m // 2]
    assert torch.equal(y[others], expected[others])


def test_graphs_replayed_on_two_streams() -> None:
    """Graphs captured on one stream, as torch does: each has its own workspace, and restores it."""
    samples = [linear_sample(m, 136, 2112, 8, torch.bfloat16, "cuda", dropout_p=0.1, seed=m) for m in (2, 9, 40)]
    expected = [run(s) for s in samples]
    graphs, results = [], []
    for s in samples:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(run(s))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(3):
        for y in results:
            y.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for y, e in zip(results, expected, strict=True):
            assert torch.equal(y, e)
