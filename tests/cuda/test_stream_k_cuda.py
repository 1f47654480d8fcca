"""The forward on CUDA whose CTAs take equal runs of the segments of all tiles (stream-K): runs that cross no, one and
several borders of tiles, LoRA and bias once per tile, and the same bits in every order of the CTAs."""

from __future__ import annotations

import os

import pytest
import torch

from accuracy import assert_accurate
from forms import FORMS, random_weight
from samples import linear_sample

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora
VARIABLE = "QLORA_CUDA_KERNEL"
BF16, HALF = torch.bfloat16, torch.float16
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
streams = pytest.mark.skipif(CAPABILITY[0] >= 10, reason="from compute capability 10.0 on, no kernel takes streams")

# (kernel, m, n, k, CTAs, rank, dtype, form of the weight). A tile has 128 rows, a segment 64 k, and a run a multiple of
# 4 segments.
CASES = [
    ("few_tokens", 1, 389, 640, 2, 16, BF16, "nf4"),  # 4 tiles of 10 segments in runs of 20, which end with a tile
    ("few_tokens", 3, 389, 640, 4, 8, BF16, "nf4"),  # runs of 12: over one border, and a last one of 4
    ("few_tokens", 5, 630, 640, 2, 33, HALF, "nf4"),  # runs of 28: over two borders. h has a launch of its own
    ("few_tokens", 16, 257, 576, 7, 16, BF16, "fp4"),  # runs of 4, tiles of 9: odd parts
    ("few_tokens", 8, 100, 1088, 3, 32, HALF, "made up"),  # one tile of 17: no border
    ("tensor_cores", 17, 389, 640, 4, 16, HALF, "nf4"),
    ("tensor_cores:tokens=32", 33, 257, 576, 7, 40, BF16, "nf4 alone"),  # on two tiles of tokens
]


@streams
@pytest.mark.parametrize(("kernel", "m", "n", "k", "ctas", "rank", "dtype", "form"), CASES)
def test_runs_over_borders(
    kernel: str,
    m: int,
    n: int,
    k: int,
    ctas: int,
    rank: int,
    dtype: torch.dtype,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every order of the CTAs. The simulator shuffles them by its seed, a card by chance."""
    s = linear_sample(m, n, k, rank, dtype, "cuda", bias=k != 576, dropout_p=0.2 * (m == 3))
    if form != "nf4":
        s.w4 = random_weight(FORMS[form], (n, k), device="cuda")
    monkeypatch.setenv(VARIABLE, f"{kernel}{',' if ':' in kernel else ':'}ctas={ctas}")
    y = OPS.linear_nf4(*s.args)
    assert_accurate(y, s.forward_accuracy())
    for seed in range(3):
        if "CUDASIM_TORCH_LIBRARY" in os.environ:
            monkeypatch.setenv("CUDASIM_SEED", str(seed))
        assert torch.equal(OPS.linear_nf4(*s.args), y)


@streams
def test_weights_and_tiles_without_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "tensor_cores:tokens=32,ctas=2")
    s = linear_sample(20, 128, 512, 8, BF16, "cuda")
    OPS.linear_nf4(*s.args)
    s.w4 = random_weight(FORMS["awq"], (128, 512), device="cuda")
    with pytest.raises(ValueError, match="tensor_cores cannot run .* with ctas=2"):
        OPS.linear_nf4(*s.args)
