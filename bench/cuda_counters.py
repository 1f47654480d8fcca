"""Counts the work of our CUDA kernels and bitsandbytes' under the kernel simulator, without a GPU.

    python bench/cuda_counters.py [--shapes 4096x4096,14336x4096]           (run under the kernel simulator)

The simulator executes the kernels' PTX on the CPU and writes what each launch did. Both contenders get the same
operands, and a result is checked before its counts are reported. Writes bench/results/kernel_simulator.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlora_ext
from cuda_operators import LINEAR_TOLERANCE, TOLERANCE
from lib.cuda_cases import BF16, OPS, peer
from lib.cuda_timing import SIMULATED
from lib.harness import Report, check_equal

PROFILE = "CUDASIM_PROFILE"  # the simulator appends a line for each launch to the file of this name
SHAPES = "4096x4096,14336x4096"  # of Llama 3 8B
TOKENS = (1, 16, 256)
DX_TOKENS = (256,)
SCALES = {False: "float32", True: "8 bits"}
NO_LORA = (None, None, 1.0, 0.0, 0, None)

Call = Callable[[], Tensor]
SECTOR = 32
ATTEMPTS = 10
NOTES = (
    "Counted under the kernel simulator, without a GPU; these are not times. The counts are of the PTX that each "
    "library embeds, before the assembler fuses and reorders it: compare contenders with each other, not with a "
    "profiler's numbers.",
    "Instructions: of all threads, over the weights. MB moved: sectors of 32 bytes of global memory that were asked "
    "for, cached or not; distinct: each byte once. Sectors used: what part of them the threads asked for, above 100% "
    "where those of a warp ask for the same bytes. Bank conflicts: part of the passes over shared memory. "
    "Tensor cores: their operations over the 2 M N K of the product. A linear layer is the base product alone, without "
    "LoRA.",
    "Library calls and torch's own operators (as by which bitsandbytes adds the offset of 8-bit scales) run on the CPU "
    "here and are not counted. A row lacks its product where the arithmetic that was counted is too little for it.",
)


@dataclasses.dataclass
class Case:
    """One operator on the same operands for both: `ours` and `theirs` are counted, `expected` is the answer."""

    operator: str
    scales: str
    m: int
    expected: Tensor
    ours: Call
    theirs: Callable[[Any], Call]  # takes bitsandbytes and makes its operands, which is not counted


class Launches:
    """What the simulator has written since it was last asked."""

    def __init__(self) -> None:
        if PROFILE not in os.environ:
            self._folder = tempfile.TemporaryDirectory()
            os.environ[PROFILE] = str(Path(self._folder.name) / "launches.jsonl")
        self._path = Path(os.environ[PROFILE])
        self._path.touch()
        self._read = self._path.stat().st_size

    def new(self) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        self._read += len(content)
        return [json.loads(line) for line in content.splitlines()]


def table_lies_well(bnb: Any, launches: Launches) -> bool:
    """Whether bitsandbytes' table of 16 values fills whole sectors. The host's heap places it here, in each process
    anew, and every lookup pays for the sectors that it covers; on a card it stays where the driver has put it."""
    if bnb is None:
        return True
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to("cuda", BF16)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    launches.new()
    bnb.functional.dequantize_4bit(packed, state)
    least = packed.nbytes + state.absmax.nbytes + 16 * 4
    return sum(launch["unique_bytes_read"] for launch in launches.new()) <= least


def kernel_name(launch: dict[str, Any]) -> str:
    """Without namespaces and parameters."""
    text = launch["kernel"].replace("(anonymous namespace)::", "")
    return re.split(r"::|\s", re.split(r"[<(]", text)[0])[-1]


def counts(launches: list[dict[str, Any]], case: Case, weights: int) -> dict[str, Any]:
    def total(*names: str) -> int:
        return sum(launch[name] for launch in launches for name in names)

    sectors = total("global_sectors_read", "global_sectors_written")
    used = total("global_sectors_read_ideal", "global_sectors_written_ideal")
    wavefronts = total("shared_wavefronts")
    product = 2 * case.m * weights
    # A product takes tensor cores, or fused multiply-adds: 2 operations a thread, of packed halves 4.
    possible = total("mma_flops") + 32 * (2 * total("fp32") + 4 * total("half"))
    names = [(name, len(list(group))) for name, group in itertools.groupby(map(kernel_name, launches))]
    return {
        "launches": len(launches),
        "instructions per weight": 32 * total("warp_instructions") / weights,
        "MB moved": sectors * SECTOR / 1e6,
        "MB distinct": total("unique_bytes_read", "unique_bytes_written") / 1e6,
        "sectors used, %": 100 * used / sectors if sectors else "",
        "bank conflicts, %": 100 * (1 - total("shared_wavefronts_ideal") / wavefronts) if wavefronts else "",
        "tensor cores / 2MNK": total("mma_flops") / product if product else "",
        "kernels": ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names),
        "not counted": "the product: a library call" if possible < product else "",
    }


def cases(n: int, k: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(BF16)

    w_cpu = normal(n, k) * 0.02
    w = w_cpu.cuda()

    def quantized(bnb: Any, nested: bool) -> tuple[Tensor, Any]:
        packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
        return packed, state

    # The CPU's bits are the device's, and the CPU is faster than the simulator.
    weights = {nested: qlora_ext.quantize_nf4(w_cpu, double_quant=nested) for nested in (False, True)}
    yield Case(
        "quantize",
        "float32",
        0,
        weights[False].packed,
        lambda: OPS.quantize_nf4(w, 64)[0],
        lambda bnb: lambda: quantized(bnb, False)[0].view(n, k // 2),
    )
    for nested, on_cpu in weights.items():
        w4 = on_cpu.to("cuda")

        def decode(bnb: Any, nested: bool = nested) -> Call:
            packed, state = quantized(bnb, nested)
            return lambda: bnb.functional.dequantize_4bit(packed, state)

        expected = on_cpu.dequantize(torch.float32)
        yield Case("dequantize", SCALES[nested], 0, expected, lambda w4=w4: w4.dequantize(BF16), decode)

    dense, w4 = weights[True].dequantize(torch.float32), weights[True].to("cuda")
    for m in TOKENS:
        x_cpu = normal(m, k)
        x = x_cpu.cuda()

        def multiply(bnb: Any, x: Tensor = x) -> Call:
            packed, state = quantized(bnb, True)
            return lambda: bnb.matmul_4bit(x, packed.t(), quant_state=state)

        ours = lambda x=x: OPS.linear_nf4(x, *w4.operands(n, None, *NO_LORA))  # noqa: E731
        yield Case("forward", SCALES[True], m, x_cpu.float() @ dense.T, ours, multiply)
    for m in DX_TOKENS:
        dy_cpu = normal(m, n)
        dy, x = dy_cpu.cuda(), normal(m, k).cuda()

        def differentiate(bnb: Any, x: Tensor = x, dy: Tensor = dy) -> Call:
            packed, state = quantized(bnb, True)
            leaf = x.clone().requires_grad_()
            y = bnb.matmul_4bit(leaf, packed.t(), quant_state=state)
            return lambda: torch.autograd.grad(y, leaf, dy)[0]

        ours = lambda dy=dy: OPS.linear_nf4_dx(dy, *w4.operands(k, *NO_LORA))  # noqa: E731
        yield Case("dX", SCALES[True], m, dy_cpu.float() @ dense, ours, differentiate)


def counted(case: Case, name: str, call: Call, launches: Launches, weights: int) -> dict[str, Any]:
    """Of one call, whose result is checked."""
    launches.new()  # what its operands took
    result = call()
    torch.cuda.synchronize()
    made = launches.new()
    what = f"{name}, {case.operator}, {case.m} tokens"
    tolerance = TOLERANCE.get(case.operator, LINEAR_TOLERANCE)
    check_equal(result.detach().cpu(), case.expected, what, tolerance)
    return counts(made, case, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="of weights, N x K (default %(default)s)")
    parser.add_argument("--attempt", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not SIMULATED:
        sys.exit("the counters are the kernel simulator's, and this does not run under it")

    launches, bnb = Launches(), peer()
    notes = list(NOTES)
    if not table_lies_well(bnb, launches):
        if arguments.attempt < ATTEMPTS:
            again = [sys.executable, *sys.argv, "--attempt", str(arguments.attempt + 1)]
            sys.exit(subprocess.run(again, check=False).returncode)
        notes.append(
            "bitsandbytes' table of values lies across a sector more than it needs, which its lookups pay for."
        )
    report = Report("cuda_counters", "CUDA work counters", notes)
    major, minor = torch.cuda.get_device_capability()
    report.machine = {
        "gpu": f"no card, kernel simulator as of compute capability {major}.{minor}",
        "bitsandbytes": getattr(bnb, "__version__", "not installed"),
        **{key: report.machine[key] for key in ("torch", "qlora_ext", "date")},
    }
    for shape in arguments.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for case in cases(n, k):
            row = {"operator": case.operator, "N x K": shape, "M": case.m or "", "scales": case.scales}
            report.add(**row, contender="ours", **counted(case, "ours", case.ours, launches, n * k))
            try:
                if bnb is None:
                    raise RuntimeError("not installed")
                theirs = counted(case, "bitsandbytes", case.theirs(bnb), launches, n * k)
            except RuntimeError as error:
                theirs = {"not counted": f"all of it: {str(error).splitlines()[0]}"}
            report.add(**row, contender="bitsandbytes", **theirs)
    report.write()


if __name__ == "__main__":
    main()
