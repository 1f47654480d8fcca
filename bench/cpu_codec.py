"""Encoding and decoding on the CPU, compared with bitsandbytes, torch's copy, and a copy with non-temporal stores.

    python bench/cpu_codec.py [--seconds 4] [--threads 2]

Rates are GB/s of input for quantize, and of input and output for dequantize. Ratios are of rates: above 1 we are
faster. bitsandbytes and the NT copy need `pip install bitsandbytes` and a C++ compiler; without them their columns are
empty. With one thread, CPU time is measured, because other processes affect it less.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import qlora_ext
from lib import harness

OPS = torch.ops.qlora
BLOCK, NESTED = 64, 256
OTHERS = ("NT copy", "torch copy", "ours, 1 thread", "bitsandbytes")
NtCopy = Callable[[Tensor, Tensor], None]


def load_nt_copy() -> NtCopy | None:
    """The NT copy, or None without a compiler. It runs on torch's OpenMP threads, because it links no other runtime."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, object_file, library = Path(__file__).with_name("nt_copy.cpp"), f"{folder}/a.o", f"{folder}/a.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-fPIC"]
        subprocess.run([compiler, *flags, "-c", str(source), "-o", object_file], check=True)
        subprocess.run([compiler, "-shared", object_file, "-o", library], check=True)
        function = ctypes.CDLL(library).nt_copy
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return lambda to, source: function(source.data_ptr(), to.data_ptr(), source.nbytes)


def decode_in_torch(packed: Tensor, absmax: Tensor, numel: int) -> Tensor:
    code = torch.tensor(qlora_ext._C.code_values("nf4"))
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1)[:numel]
    return code[nibbles.long()] * absmax.repeat_interleave(BLOCK)[:numel]


class Bench:
    def __init__(self, report: harness.Report, seconds: float) -> None:
        self.report, self.seconds = report, seconds
        self.nt_copy = load_nt_copy()
        self.bnb = None
        if importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes.functional

            self.bnb = bitsandbytes.functional

    def run(self, op: str, where: str, weight: Tensor, calls: dict[str, harness.Call], moved: float) -> None:
        """`moved` is the number of bytes for ours and bitsandbytes. Copies read and write the weight."""
        copied = weight.nbytes * (2 if op == "dequantize" else 1)
        size = {"ours": moved, "ours, 1 thread": moved, "bitsandbytes": moved}
        clock = harness.thread_clock if torch.get_num_threads() == 1 else harness.wall_clock
        times = harness.interleave(calls, seconds=self.seconds, clock=clock)

        def ratio_of_rates(other: str) -> harness.Spread:
            scale = moved / size.get(other, copied)
            low, median, high = (x * scale for x in sorted(times.ratio(other, "ours")))
            return harness.Spread(median, low, high)

        self.report.add(
            op=op,
            dtype=str(weight.dtype).removeprefix("torch."),
            shape="x".join(map(str, weight.shape)),
            operands=where,
            median=f"{moved / times.median('ours') / 1e9:.1f} GB/s",
            best=f"{moved / times.best('ours') / 1e9:.1f} GB/s",
            **{f"ours / {name}": ratio_of_rates(name) for name in OTHERS if name in times},
        )

    def copies(self, weights: harness.Ring[Tensor]) -> dict[str, harness.Call]:
        targets = harness.Ring(torch.empty_like(w) for w in weights)
        nt_copy = self.nt_copy
        calls: dict[str, harness.Call] = {"torch copy": lambda i: targets.at(i).copy_(weights.at(i))}
        if nt_copy is not None:
            calls["NT copy"] = lambda i: nt_copy(targets.at(i), weights.at(i))
        return calls

    def quantize(self, shape: tuple[int, int], dtype: torch.dtype, cold: bool) -> None:
        first = torch.randn(shape).to(dtype)
        packed, absmax = OPS.quantize_nf4(first, BLOCK)
        error = (decode_in_torch(packed, absmax, first.numel()) - first.float().reshape(-1)).abs()
        if not bool((error.reshape(-1, BLOCK).amax(1) <= 0.16 * absmax).all()):  # half the widest gap of the code
            raise AssertionError("quantize: the result is wrong; not timed")
        weights = harness.cold(first.clone, first.nbytes) if cold else harness.Ring([first])
        outputs: harness.Ring[object] = harness.Ring([None] * 3)

        def ours(i: int) -> None:
            packed, absmax = OPS.quantize_nf4(weights.at(i), BLOCK)
            outputs.put(i, (packed, OPS.quantize_absmax(absmax, NESTED)))

        calls = one_and_all_threads(ours) | self.copies(weights)
        if (bnb := self.bnb) is not None:
            calls["bitsandbytes"] = lambda i: bnb.quantize_4bit(
                weights.at(i), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            if not torch.equal(
                bnb.quantize_4bit(first, blocksize=BLOCK, quant_type="nf4")[0].reshape(-1), packed.reshape(-1)
            ):
                raise AssertionError("quantize: the bytes differ from bitsandbytes'; not timed")
        self.run("quantize", "cold" if cold else "in cache", first, calls, float(first.nbytes))

    def dequantize(self, shape: tuple[int, int], dtype: torch.dtype, cold: bool) -> None:
        first = torch.randn(shape).to(dtype)
        numel = first.numel()
        packed, absmax = OPS.quantize_nf4(first, BLOCK)
        scales = OPS.quantize_absmax(absmax, NESTED)

        def decode(packed: Tensor) -> Tensor:
            return OPS.dequantize_nf4(packed, *scales, BLOCK, NESTED, list(shape), dtype)

        expected = decode_in_torch(packed, OPS.dequantize_absmax(*scales, NESTED), numel).to(dtype)
        harness.check_equal(decode(packed).reshape(-1), expected, "dequantize")
        weights = harness.cold(first.clone, first.nbytes) if cold else harness.Ring([first])
        packs = harness.Ring(packed.clone() for _ in weights)
        outputs: harness.Ring[object] = harness.Ring([None] * len(weights))
        calls = one_and_all_threads(lambda i: outputs.put(i, decode(packs.at(i)))) | self.copies(weights)
        if (bnb := self.bnb) is not None:
            _, state = bnb.quantize_4bit(first, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
            flat = harness.Ring(p.reshape(-1, 1) for p in packs)
            calls["bitsandbytes"] = lambda i: outputs.put(i, bnb.dequantize_4bit(flat.at(i), state))
        moved = numel * (0.5 + 1 / BLOCK + first.element_size())
        self.run("dequantize", "cold" if cold else "in cache", first, calls, moved)


def one_and_all_threads(call: harness.Call) -> dict[str, harness.Call]:
    threads = torch.get_num_threads()

    def with_one(i: int) -> None:
        torch.set_num_threads(1)
        call(i)
        torch.set_num_threads(threads)

    return {"ours": call} if threads == 1 else {"ours": call, "ours, 1 thread": with_one}


def main() -> None:
    parser = harness.parser(__doc__, seconds=4.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    torch.manual_seed(0)
    report = harness.Report(
        f"codec_{arguments.threads}_threads",
        "Encode and decode on the CPU",
        [
            "With double quantization. quantize: GB/s of input; dequantize: GB/s of input and output. Ratios are of",
            "rates, median (10th to 90th percentile); above 1 ours is faster.",
        ],
    )
    bench = Bench(report, arguments.seconds)
    large, small = (4096, 4096), (1536, 576)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bench.quantize(large, dtype, cold=True)
    bench.quantize(small, torch.bfloat16, cold=False)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        bench.dequantize(large, dtype, cold=True)
    bench.dequantize(small, torch.bfloat16, cold=False)
    report.write()


if __name__ == "__main__":
    main()
