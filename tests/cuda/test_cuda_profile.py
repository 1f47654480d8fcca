"""The work of the CUDA kernels, by the kernel simulator's counters, which are deterministic and can be asserted.

Each architecture's cases run in one process of this file, which prints what each launch did. An issue slot is a warp
instruction times 32. Ideal traffic is every distinct byte moved once. Cases are in bfloat16, with nested scales and
LoRA of rank 16, unless they say otherwise.
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
BF16 = torch.bfloat16
OPS = torch.ops.qlora
KERNEL = "QLORA_CUDA_KERNEL"

RANK = 16
SHAPES = [(1024, 1024), (1024, 2048)]  # the sum over k of the second is split over two CTAs
FEW_TOKENS = 16  # in one launch, including LoRA
FORWARD_SLOTS = {1: 5, 4: 5, 8: 5, 16: 6, 64: 9}  # tokens: maximum issue slots per weight
DX_SLOTS = 10
RETAINING = ["few_tokens", "tensor_cores", "ragged"]  # kernels behind a launch that computes h

# Encoding: columns that are rounded together, in registers, and rows of a CTA, for so few rows.
ENCODED, BLOCK, BATCH, ROWS = (64, 512), 64, 128, 8

# Forms of weights, compared with NF4's in blocks of the same size.
FORM_SHAPE = (384, 1024)
NF4 = ("nf4", "nested8", "no")
FORMATS = {  # what checkpoints have in blocks of a size
    128: [("uint4", "float16", "zero_point8")],  # AWQ and GPTQ
    64: [  # compressed-tensors, without zero points and with
        ("int4", "float16", "no"),
        ("int4", "bfloat16", "no"),
        ("fp4", "float32", "no"),
        ("uint4", "bfloat16", "zero_point8"),
        ("int4", "float32", "zero_point8"),
    ],
    32: [  # MXFP4, Q4_0, IQ4_NL, Q4_1
        ("e2m1", "table8", "no"),
        ("int4", "float16", "no"),
        ("iq4_nl", "float16", "no"),
        ("uint4", "float16", "float16"),
    ],
    16: [("e2m1", "table8", "no")],  # NVFP4
}
# Forms of codes of more than 4 bits: how often a warp asks for a sector, of which L1 serves the second plane of a unit,
# and the most issue slots per weight, including the tables.
WIDE = {"q8_0": (1.02, 16), "fp8": (1.05, 17), "q5_k": (2.3, 26), "q6_k": (2.15, 24)}
OVER_NF4 = {128: 1.05, 64: 1.05, 32: 1.05, 16: 1.15}  # the most instructions
OPERATORS = ["dequantize", *(f"forward {m}" for m in (1, 16, 64)), *(f"dx {m}" for m in (16, 64))]

# Experts, of which those in ROWS_OF have rows.
EXPERTS = [8, 64, 128]
ROWS_OF = {1: 5, 3: 12, 6: 40}
EXPERT_SHAPE = (384, 512)
MANY_ROWS = [1500, 31, 0, 1569]  # of experts with 8 outputs
TABLES = 4096  # bytes of constants
GROUPED = {"forward": 2, "dx": 2, "dlora": 3}  # operators, and their launches

# Hopper's kernels at two lengths of the sum. The difference is the work of blocks: in the forward, 64 k of 128 rows for
# 128 tokens; in dX, 64 rows of 128 columns for 256 tokens. Pairs of tiles.
SM90 = {
    "forward": ("sm90:tokens=128,splits=1,multicast=2", [(256, 8192, 1024), (256, 8192, 2048)]),  # 2 x 64 tiles
    "dx": ("sm90:tokens=256,splits=3,multicast=2", [(256, 1024, 4352), (256, 2048, 4352)]),  # 34 tiles, three CTAs each
}
BLOCKS = {"forward": 128 * (2048 - 1024) // 64, "dx": 34 * (2048 - 1024) // 64}
TOKENS = {"forward": 128, "dx": 256}

# ---- what the simulated process runs ----


def linear(record: Recorder) -> None:
    from operator_results import gradient
    from samples import linear_sample, relative_error

    for n, k in SHAPES:
        s = linear_sample(max(FORWARD_SLOTS), n, k, RANK, BF16, "cuda", bias=False)
        x = s.x
        for m in FORWARD_SLOTS:
            s.x = x[:m].contiguous()
            y = record(f"linear_nf4 {m} {n} {k}", OPS.linear_nf4, *s.args)
            record(f"linear_nf4_dx {m} {n} {k}", OPS.linear_nf4_dx, *s.dx_args(gradient(s)))
            expected = s.forward_accuracy()
            rounded = torch.from_numpy(expected.exact).to(BF16)
            record.cases[f"errors {m} {n} {k}"] = [relative_error(t, expected.exact) for t in (y, _plain(s), rounded)]
    s = linear_sample(80, *SHAPES[0], RANK, BF16, "cuda", bias=False)
    record("aligned", OPS.linear_nf4, *s.args)
    for name in ("x", "lora_a", "lora_b"):  # one element past a 16-byte boundary
        t = getattr(s, name)
        setattr(s, name, torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view_as(t).copy_(t))
    record("unaligned", OPS.linear_nf4, *s.args)
    few = linear_sample(4, 136, 256, RANK, BF16, "cuda")
    for name in RETAINING:
        os.environ[KERNEL] = name
        record(f"retained {name}", OPS.linear_nf4_with_h, *few.args)
        os.environ["QLORA_CUDA_START"] = "in_order"
        record(f"in order {name}", OPS.linear_nf4_with_h, *few.args)
        os.environ["QLORA_CUDA_START"] = ""
    os.environ[KERNEL] = ""


def _plain(s: Any) -> torch.Tensor:
    """Dequantize to bfloat16 and multiply, with a separate LoRA branch and float32 sums: the unfused baseline."""
    w = torch.from_numpy(s.decoded()).to(BF16).float()
    x, a, b = (t.cpu().float() for t in (s.x, s.lora_a, s.lora_b))
    h = (x @ a.T).to(BF16).float()
    base = (x @ w.T).to(BF16)
    return base + ((h @ b.T).to(BF16) * s.scaling)


def codec(record: Recorder) -> None:
    w = (torch.randn(*SHAPES[0]) * 0.02).to("cuda", BF16)
    packed, absmax = record("quantize", OPS.quantize_nf4, w, 64)
    scales = OPS.quantize_absmax(absmax, 256)
    record("dequantize", OPS.dequantize_nf4, packed, *scales, 64, 256, [*SHAPES[0]], BF16)
    (n, k), of = ENCODED, torch.randn(*ENCODED).to("cuda", BF16)
    factors = (torch.eye(k) + 0.01 * torch.randn(k, k).triu(1)).cuda()
    absmax = torch.rand(n * k // BLOCK).cuda() + 0.5
    record("search", OPS.search_absmax_nf4, of, torch.rand(k).cuda(), BLOCK)
    record("encode", OPS.encode_nf4, of, absmax, BLOCK)
    record("stochastic", OPS.encode_nf4_stochastic, of, absmax, BLOCK, 0)
    record("feedback", OPS.encode_nf4, of, absmax, BLOCK, factors, torch.arange(k).cuda())


def formats(record: Recorder) -> None:
    from forms import WIDE_FORMS, random_weight
    from test_formats_cuda import normal, weight

    n, k = FORM_SHAPE
    for name in WIDE:
        record(f"dequantize {name}", random_weight(WIDE_FORMS[name], (n, k), device="cuda").dequantize, BF16)
    for block, forms in FORMATS.items():
        for form in [NF4, *forms]:
            w4 = weight((n, k), *form, block).to("cuda")
            name = f"{block} {' '.join(form)}"
            record(f"{name} dequantize", w4.dequantize, BF16)
            no_lora = None, None, 1.0, 0.0, 0, None
            for m in (1, 16, 64):
                record(f"{name} forward {m}", OPS.linear_nf4, normal((m, k), BF16), *w4.operands(n, None, *no_lora))
            for m in (16, 64):
                record(f"{name} dx {m}", OPS.linear_nf4_dx, normal((m, n), BF16), *w4.operands(k, *no_lora))


def experts(record: Recorder) -> None:
    from grouped_samples import grouped_sample

    for count in EXPERTS:
        rows = [ROWS_OF.get(e, 0) for e in range(count)]
        s = grouped_sample(rows, *EXPERT_SHAPE, RANK, BF16, "cuda", dropout_p=0.1, unassigned=0)
        dy = s.dy()
        for name, run, args in (("forward", s.forward, ()), ("dx", s.dx, (dy,)), ("dlora", s.dlora, (dy,))):
            record(f"experts {name} {count}", run, *args)
        os.environ[KERNEL] = f"gemm:panel={EXPERT_SHAPE[0]}"
        record(f"experts decoded once {count}", s.forward)
        os.environ[KERNEL] = ""
    many = grouped_sample(MANY_ROWS, 8, EXPERT_SHAPE[1], RANK, BF16, "cuda", dropout_p=0.1, unassigned=0)
    record("many rows", many.forward)


def hopper(record: Recorder) -> None:
    from operator_results import gradient
    from samples import linear_sample

    for op, (kernel, shapes) in SM90.items() if torch.cuda.get_device_capability() == (9, 0) else ():
        os.environ[KERNEL] = kernel
        for i, shape in enumerate(shapes):
            s = linear_sample(*shape, None, BF16, "cuda", bias=False)
            call, args = (OPS.linear_nf4, s.args) if op == "forward" else (OPS.linear_nf4_dx, s.dx_args(gradient(s)))
            record(f"sm90 {op} {i}", call, *args)
    os.environ[KERNEL] = ""


# ---- what the counters must be ----


@pytest.fixture(scope="module", params=["80", "90"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cases(arch: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> launches, errors or, for `tile <name>`, the parameters of the kernel that was chosen. `block <operator>`
    has a block's share of the counters of Hopper's kernels."""
    profile = tmp_path_factory.mktemp("profile") / "launches.jsonl"
    run = simulated(__file__, arch, profile, QLORA_PRINT_KERNELS="1", QLORA_CUDA_KERNEL="")
    found = cases_printed(run)
    found = {name: v if name.startswith("errors") else [Launch(launch) for launch in v] for name, v in found.items()}
    line = r"^qlora: (\w+) cuda m=(\d+) n=(\d+) k=(\d+) .*-> (?:few_tokens|tensor_cores|sm90) (.*)$"
    for *name, tile in re.findall(line, run.stderr, flags=re.M):
        parameters = dict(parameter.split("=") for parameter in tile.split())
        found["tile " + " ".join(name)] = {key: int(value) for key, value in parameters.items()}
    for op in SM90 if arch == "90" else ():
        (short,), (long,) = found[f"sm90 {op} 0"], found[f"sm90 {op} 1"]
        assert short["grid"] == long["grid"]
        numbers = {name: value for name, value in long.items() if isinstance(value, int)}
        found[f"block {op}"] = [Launch({name: (v - short[name]) / BLOCKS[op] for name, v in numbers.items()})]
    return found


MEASURES = {
    "slots": lambda launch: launch.slots,
    "bytes read": lambda launch: launch.bytes_read,
    "conflicts": lambda launch: launch.conflicts,
    "moved": lambda launch: launch.moved,
    "read, of the distinct": lambda launch: launch.bytes_read / launch["unique_bytes_read"],
    "read, of the ideal": lambda launch: launch["global_sectors_read"] / launch["global_sectors_read_ideal"],
    "written, of the distinct": lambda launch: launch["global_sectors_written"] * 32 / launch["unique_bytes_written"],
}
WEIGHTS, FEW = 1024 * 1024, ENCODED[0] * ENCODED[1]
BATCHES, PACKED = ENCODED[1] // BATCH, 128 * 64 // 2
# A block's scale is read with each load of its weights.
READ_ONCE = 1.1 * FEW * (2 + 4 / BLOCK * 4)
# Each CTA reads the factors of a batch and all before it, the errors before it, order and diagonal; and weights and
# scales, and the codes again, once.
FEEDBACK_READ = (
    ENCODED[0] // ROWS * 4 * BATCH**2 * BATCHES * (BATCHES + 1) // 2
    + ENCODED[0] * 4 * BATCH * BATCHES * (BATCHES - 1) // 2
    + ENCODED[0] // ROWS * ENCODED[1] * (8 + 32)
    + FEW * (2 + 4 + 1)
)
# A product and a difference per pair of columns; the pairs within a batch count twice, and are rounded. A warp rounds 4
# rows at once.
FEEDBACK_FP32 = (1.02 * FEW * (ENCODED[1] + BATCH) + 20 * FEW * 32 / 4) / 32
# Case -> the most of a measure or counter in its only launch.
MOST = {
    "dequantize": {"moved": 1.02, "read, of the distinct": 1.02, "slots": 7 * WEIGHTS, "conflicts": 0.05},
    "quantize": {"moved": 1.02, "slots": 16 * WEIGHTS, "conflicts": 0},
    "search": {"slots": 800 * FEW, "read, of the ideal": 1.02, "conflicts": 0.01},  # of 31 candidates
    "encode": {"slots": 16 * FEW, "bytes read": READ_ONCE, "written, of the distinct": 1.02, "conflicts": 0.01},
    "stochastic": {"slots": 40 * FEW, "bytes read": READ_ONCE, "written, of the distinct": 1.02, "conflicts": 0.01},
    "feedback": {"fp32": FEEDBACK_FP32, "bytes read": 1.05 * FEEDBACK_READ, "conflicts": 0.01},
    # Issue slots of four schedulers, while the tensor cores need 512 and 1024 clocks. The wavefronts are those of the
    # warps' loads and stores; wgmma reads tokens twice, and TMA writes tokens and packed bytes, 128 bytes per pass. TMA
    # reads packed bytes and half of the tokens, the other CTA of a pair the other half. Each warp reads at most the
    # sectors of its rows' scales again.
    "block forward": {
        "warp_instructions": 4 * 292,
        "conflicts": 0.02,
        "shared_wavefronts": 250,
        "bytes read": 128 * 64 + PACKED + 128 * 32,
    },
    "block dx": {
        "warp_instructions": 4 * 400,
        "conflicts": 0.02,
        "shared_wavefronts": 460,
        "bytes read": 1.05 * (256 * 64 + PACKED + 128 * (32 + 32)),
    },
}


def check_most(name: str, launch: Launch) -> None:
    assert launch["local_bytes"] == 0
    found = {what: MEASURES[what](launch) if what in MEASURES else launch[what] for what in MOST[name]}
    assert {what: value for what, value in found.items() if value > MOST[name][what]} == {}


@pytest.mark.parametrize("name", [name for name in MOST if "block" not in name])
def test_most(cases: dict[str, Any], name: str) -> None:
    (launch,) = cases[name]
    check_most(name, launch)


@pytest.mark.parametrize("op", SM90)
def test_blocks_of_hoppers_kernels(cases: dict[str, Any], arch: str, op: str) -> None:
    if arch != "90":
        pytest.skip("the device is not of compute capability 9.0, which alone has wgmma")
    (block,), tokens = cases[f"block {op}"], TOKENS[op]
    check_most(f"block {op}", block)
    assert block["mma_flops"] == 2 * tokens * 128 * 64
    # Two tiles with the same tokens are computed by a pair of CTAs, each of which copies half of them to both.
    assert 32 * block["async_sectors_read"] == tokens * 64 + PACKED
    assert 32 * block["async_sectors_received"] == tokens * 64 * 2 + PACKED
    for i, (m, n, k) in enumerate(SM90[op][1]):
        (launch,) = cases[f"sm90 {op} {i}"]
        assert "sm90" in launch["kernel"]
        assert launch["local_bytes"] == 0
        assert launch["global_sectors_written"] * 32 == 2 * m * (k if op == "dx" else n)  # full sectors
        # Every cluster has one pair of tiles, so the busiest one executes its share of the instructions.
        clusters = launch["grid"][0] // launch["cluster"][0]
        assert 1 <= launch["busiest_cluster_instructions"] * clusters / launch["warp_instructions"] <= 1.02


def test_unaligned_operands_run_with_the_same_kernels(cases: dict[str, Any]) -> None:
    assert [launch["kernel"] for launch in cases["unaligned"]] == [launch["kernel"] for launch in cases["aligned"]]
    assert sum(launch.slots for launch in cases["unaligned"]) <= 1.05 * sum(launch.slots for launch in cases["aligned"])


def test_from_hopper_on_the_kernel_behind_a_low_rank_product_starts_early(cases: dict[str, Any], arch: str) -> None:
    for name in [*(f"retained {kernel}" for kernel in RETAINING), *(f"experts {op} {EXPERTS[0]}" for op in GROUPED)]:
        assert "low_rank" in cases[name][0]["kernel"]
        for launch in cases[name]:
            assert launch["dependent"] == (arch == "90" and "low_rank" not in launch["kernel"]), launch["kernel"]
    for kernel in RETAINING:
        in_order = cases[f"in order {kernel}"]
        assert [launch["kernel"] for launch in in_order] == [launch["kernel"] for launch in cases[f"retained {kernel}"]]
        assert not any(launch["dependent"] for launch in in_order)


def check_work(launches: list[Launch], slots: float) -> None:
    """Checks that a call's launches, of which the last reads the packed weight, have no spills or bank conflicts."""
    assert launches[-1]["local_bytes"] == 0
    assert sum(launch.slots for launch in launches) <= slots
    assert launches[-1].conflicts <= 0.05


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", FORWARD_SLOTS)
def test_forward(cases: dict[str, Any], m: int, n: int, k: int) -> None:
    *h, y = cases[f"linear_nf4 {m} {n} {k}"]
    # Compares the errors without the rounding of y, which is unavoidable.
    error, plain, rounding = cases[f"errors {m} {n} {k}"]
    assert error**2 - rounding**2 <= (plain**2 - rounding**2) / 4
    if "sm90" in y["kernel"]:
        pytest.skip("another kernel, whose work is that of its blocks")
    tile = cases[f"tile linear_nf4 {m} {n} {k}"]
    row_tiles, splits = -(-n // tile["rows"]), tile["splits"]
    check_work([*h, y], FORWARD_SLOTS[m] * n * k)
    if m == 1:
        assert y["shared_wavefronts"] <= 360 / 16384 * n * k

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
def test_dx(cases: dict[str, Any], m: int, n: int, k: int) -> None:
    g, dx = cases[f"linear_nf4_dx {m} {n} {k}"]
    assert "low_rank" in g["kernel"]
    if "sm90" in dx["kernel"]:
        pytest.skip("another kernel, whose work is that of its blocks")
    tile = cases[f"tile linear_nf4_dx {m} {n} {k}"]
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


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("block", FORMATS)
def test_formats_cost_what_nf4_costs(cases: dict[str, Any], block: int, operator: str) -> None:
    """Zero points are subtracted from the codes, and dX takes an FMA per weight for the product with the scale. Loading
    them costs something where a warp decodes few weights per block. Offsets are added to each weight in the FMA that
    scales it. NF4's forward in blocks of 32 is ragged."""
    for form in FORMATS[block]:
        own, nf4 = (cases[f"{block} {' '.join(f)} {operator}"] for f in (form, NF4))
        assert all(launch["local_bytes"] == 0 for launch in own)
        most = OVER_NF4[block]
        if form[2] == "zero_point8":
            most = {"dequantize": 1.08, "dx 16": 1.07}.get(operator, most)
        elif form[2] != "no" and "forward" not in operator:
            most = 1.15
        assert sum(launch.slots for launch in own) <= most * sum(launch.slots for launch in nf4), form


@pytest.mark.parametrize("name", WIDE)
def test_decoding_wide_codes(cases: dict[str, Any], name: str) -> None:
    (launch,), (n, k), (asked, slots) = cases[f"dequantize {name}"], FORM_SHAPE, WIDE[name]
    assert launch["local_bytes"] == 0
    assert launch["unique_bytes_written"] == 32 * launch["global_sectors_written"] == 2 * n * k
    assert launch.bytes_read <= asked * launch["unique_bytes_read"]
    assert launch.slots <= slots * n * k


@pytest.mark.parametrize("name", GROUPED)
def test_idle_experts(cases: dict[str, Any], name: str) -> None:
    """Launches do not grow with the experts. Of those without rows nothing is read but their offsets."""
    rows, (n, k) = sum(ROWS_OF.values()), EXPERT_SHAPE
    given, made = (k, n) if name == "forward" else (n, k)
    for count in EXPERTS:
        launches = cases[f"experts {name} {count}"]
        assert len(launches) == GROUPED[name]
        assert all("grouped" in launch["kernel"] for launch in launches)
        assert all(launch["local_bytes"] == 0 for launch in launches)
        if name != "dlora":  # the packed bytes, codes and adapters of the 3 experts, the rows, and an offset per expert
            low_rank, main = launches
            weights = len(ROWS_OF) * (n * k // 2 + n * k // 64 + 4 * (n * k // 64 // 256 + 1 + 1) + 2 * RANK * made)
            assert main["unique_bytes_read"] <= weights + 2 * rows * (given + RANK) + 8 * count + TABLES
            assert low_rank["unique_bytes_read"] <= 2 * (rows + RANK * len(ROWS_OF)) * given + 8 * count
    # Zeros are written for their gradients. The tiles are the same for 64 and 128 experts.
    few, many = (sum(launch.slots for launch in cases[f"experts {name} {count}"]) for count in EXPERTS[1:])
    assert many <= 1.1 * few + 30 * (64 * RANK * (n + k) if name == "dlora" else 0)


@pytest.mark.parametrize("count", EXPERTS)
def test_experts_without_rows_are_not_decoded(cases: dict[str, Any], count: int) -> None:
    n, k = EXPERT_SHAPE
    launches = cases[f"experts decoded once {count}"]
    names = ("grouped_low_rank", "grouped_dequantize", "grouped_linear_gemm")
    assert all(name in launch["kernel"] for name, launch in zip(names, launches, strict=True))
    assert launches[1]["unique_bytes_written"] == len(ROWS_OF) * 2 * n * k


def test_of_many_rows_a_is_read_once_per_32(cases: dict[str, Any]) -> None:
    low_rank, _ = cases["many rows"]
    tiles = sum(-(-rows // 32) for rows in MANY_ROWS)
    assert low_rank.bytes_read <= 1.02 * 2 * EXPERT_SHAPE[1] * (sum(MANY_ROWS) + RANK * tiles)


if __name__ == "__main__":
    record = Recorder(Path(sys.argv[1]))
    for run in (linear, codec, formats, experts, hopper):
        run(record)
    print(json.dumps(record.cases))
