"""The work of the CUDA kernels, by the kernel simulator's counters, which are deterministic and can be asserted.

Each architecture's cases run in one process of this file, which prints what each launch did. An issue slot is a warp
instruction times 32, counted per weight over all launches of a call. Ideal traffic is every distinct byte moved once.
The tiles determine how often an operand is read again; they are read from the output of QLORA_PRINT_KERNELS. bfloat16,
nested scales, LoRA of rank 16.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_profiles import Launch, Recorder, cases_printed, needs_counters, simulated

pytestmark = needs_counters

RANK = 16
SHAPES = [(1024, 1024), (1024, 2048)]  # the sum over k of the second is split over two CTAs
FEW_TOKENS = 16  # in one launch, including LoRA
FORWARD_SLOTS = {1: 5, 4: 5, 8: 5, 16: 6, 64: 9}  # tokens: maximum issue slots per weight
DX_SLOTS = 10
RETAINING = ["few_tokens", "tensor_cores", "ragged"]  # kernels behind a launch that computes h
ONE_TOKEN_WAVEFRONTS = 360 / 16384  # of shared memory, per weight


def run_cases(profile: Path) -> dict[str, Any]:
    from samples import linear_sample, relative_error

    ops = torch.ops.qlora
    record = Recorder(profile)
    for n, k in SHAPES:
        s = linear_sample(max(FORWARD_SLOTS), n, k, RANK, torch.bfloat16, "cuda", bias=False)
        x = s.x
        for m in FORWARD_SLOTS:
            s.x = x[:m].contiguous()
            y = record(f"linear_nf4 {m} {n} {k}", ops.linear_nf4, *s.args)
            dy = torch.randn(m, n).to("cuda", torch.bfloat16)
            record(f"linear_nf4_dx {m} {n} {k}", ops.linear_nf4_dx, *s.dx_args(dy))
            expected = s.forward_accuracy()
            rounded = torch.from_numpy(expected.exact).to(torch.bfloat16)
            record.cases[f"errors {m} {n} {k}"] = [relative_error(t, expected.exact) for t in (y, _plain(s), rounded)]
    n, k = SHAPES[0]
    s = linear_sample(80, n, k, RANK, torch.bfloat16, "cuda", bias=False)
    record("aligned", ops.linear_nf4, *s.args)
    for name in ("x", "lora_a", "lora_b"):
        setattr(s, name, unaligned(getattr(s, name)))
    record("unaligned", ops.linear_nf4, *s.args)
    few = linear_sample(4, 136, 256, RANK, torch.bfloat16, "cuda")
    for name in RETAINING:
        os.environ["QLORA_CUDA_KERNEL"] = name
        record(f"retained {name}", ops.linear_nf4_with_h, *few.args)
    os.environ["QLORA_CUDA_KERNEL"] = ""
    w = (torch.randn(n, k) * 0.02).to("cuda", torch.bfloat16)
    packed, absmax = record("quantize", ops.quantize_nf4, w, 64)
    scales = ops.quantize_absmax(absmax, 256)
    record("dequantize", ops.dequantize_nf4, packed, *scales, 64, 256, [n, k], torch.bfloat16)
    return record.cases


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, but one element past a 16-byte boundary."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view_as(t).copy_(t)
    assert moved.data_ptr() % 16 != 0
    return moved


def _plain(s: Any) -> torch.Tensor:
    """Dequantize to bfloat16 and multiply, with a separate LoRA branch and float32 sums: the unfused baseline."""
    w = torch.from_numpy(s.decoded()).to(torch.bfloat16).float()
    x, a, b = (t.cpu().float() for t in (s.x, s.lora_a, s.lora_b))
    h = (x @ a.T).to(torch.bfloat16).float()
    base = (x @ w.T).to(torch.bfloat16)
    return base + ((h @ b.T).to(torch.bfloat16) * s.scaling)


@pytest.fixture(scope="module", params=["80", "90"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cases(arch: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> launches, errors or, for `tile <name>`, the parameters of the kernel that was chosen."""
    profile = tmp_path_factory.mktemp("profile") / "launches.jsonl"
    run = simulated(__file__, arch, profile, QLORA_PRINT_KERNELS="1", QLORA_CUDA_KERNEL="")
    found = cases_printed(run)
    found = {name: v if name.startswith("errors") else [Launch(launch) for launch in v] for name, v in found.items()}
    line = r"^qlora: (\w+) cuda m=(\d+) n=(\d+) k=(\d+) .*-> (?:few_tokens|tensor_cores|sm90) (.*)$"
    for *name, tile in re.findall(line, run.stderr, flags=re.M):
        parameters = dict(parameter.split("=") for parameter in tile.split())
        found["tile " + " ".join(name)] = {key: int(value) for key, value in parameters.items()}
    return found


def test_dequantize(cases: dict[str, Any]) -> None:
    (launch,) = cases["dequantize"]
    n, k = SHAPES[0]
    assert launch.moved <= 1.02
    assert launch.bytes_read <= 1.02 * launch["unique_bytes_read"]
    assert launch.slots <= 7 * n * k
    assert launch.conflicts <= 0.05


def test_quantize(cases: dict[str, Any]) -> None:
    (launch,) = cases["quantize"]
    n, k = SHAPES[0]
    assert launch.moved <= 1.02
    assert launch.slots <= 16 * n * k
    assert launch.conflicts == 0


def test_unaligned_operands_run_with_the_same_kernels(cases: dict[str, Any]) -> None:
    assert [launch["kernel"] for launch in cases["unaligned"]] == [launch["kernel"] for launch in cases["aligned"]]
    assert sum(launch.slots for launch in cases["unaligned"]) <= 1.05 * sum(launch.slots for launch in cases["aligned"])


@pytest.mark.parametrize("name", RETAINING)
def test_from_hopper_on_the_forward_starts_before_h_is_complete(cases: dict[str, Any], arch: str, name: str) -> None:
    low_rank, y = cases[f"retained {name}"]
    assert "low_rank" in low_rank["kernel"]
    assert not low_rank["dependent"]
    assert y["dependent"] == (arch == "90")


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", FORWARD_SLOTS)
def test_forward(cases: dict[str, Any], m: int, n: int, k: int) -> None:
    *h, y = cases[f"linear_nf4 {m} {n} {k}"]
    if "sm90" in y["kernel"]:
        pytest.skip("another kernel, whose work is in test_cuda_profile_sm90.py")
    tile = cases[f"tile linear_nf4 {m} {n} {k}"]
    row_tiles, splits = -(-n // tile["rows"]), tile["splits"]
    check_work([*h, y], FORWARD_SLOTS[m] * n * k)
    if m == 1:
        assert y["shared_wavefronts"] <= ONE_TOKEN_WAVEFRONTS * n * k

    # The packed bytes and lora_b once, and codes (two splits may share a sector of them); again for each tile of rows x
    # and, where h is its own launch, by warps h, else lora_a and by warps the few nested scales; and the sums of the
    # splits.
    once = n * k // 2 + splits * n * k // 64 + 2 * n * RANK
    again = 2 * m * k + 4 * m * tile["rows"] * splits * (splits > 1)
    if m <= FEW_TOKENS:
        assert h == []
        again += 2 * RANK * k + splits * y.warps * 1024
        columns = 2 * tile["tokens"]  # of the mma: a token has one for each of two segments
        assert y["mma_flops"] <= 1.02 * 2 * n * k * columns + 2 * row_tiles * 16 * k * max(tile["tokens"], 8)
    else:
        (low_rank,) = h
        assert "low_rank" in low_rank["kernel"]
        again += 2 * m * y.warps * RANK
        assert y["mma_flops"] <= 1.1 * 2 * m * (n * k + RANK * n)
    assert y.bytes_read <= 1.05 * once + row_tiles * again


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", FORWARD_SLOTS)
def test_forward_has_half_the_error_of_rounded_weights(cases: dict[str, Any], m: int, n: int, k: int) -> None:
    """Compares the errors without the rounding of y, which is unavoidable."""
    error, plain, rounding = cases[f"errors {m} {n} {k}"]
    assert error**2 - rounding**2 <= (plain**2 - rounding**2) / 4


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", FORWARD_SLOTS)
def test_dx(cases: dict[str, Any], m: int, n: int, k: int) -> None:
    g, dx = cases[f"linear_nf4_dx {m} {n} {k}"]
    if "sm90" in dx["kernel"]:
        pytest.skip("another kernel, whose work is in test_cuda_profile_sm90.py")
    tile = cases[f"tile linear_nf4_dx {m} {n} {k}"]
    assert "low_rank" in g["kernel"]
    check_work([g, dx], DX_SLOTS * n * k)
    tokens = -(-m // 16) * 16  # an mma has at least 8, and 16 may be its other dimension
    assert dx["mma_flops"] <= 1.1 * 2 * tokens * (n * k + RANK * max(n, k))

    # The packed bytes and lora_a once; dy, codes and, by its warps, g again for each tile of columns; and the sums of
    # the splits, of whole tiles of tokens.
    column_tiles, splits = -(-k // tile["columns"]), tile["splits"]
    tokens = -(-m // tile["tokens"]) * tile["tokens"]
    again = column_tiles * (2 * m * n + n * k // 64 + dx.warps * 2 * m * RANK)
    again += 4 * tokens * k * splits if splits > 1 else 0
    assert dx.bytes_read <= 1.05 * (n * k // 2 + 2 * k * RANK + again)


def check_work(launches: list[Launch], slots: float) -> None:
    """Checks that a call's launches, of which the last reads the packed weight, have no spills or bank conflicts."""
    assert launches[-1]["local_bytes"] == 0
    assert sum(launch.slots for launch in launches) <= slots
    assert launches[-1].conflicts <= 0.05


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]))))
