"""The number of tokens from which decoding and a library's matmul are faster than the fused kernels on this GPU.

    python bench/cuda_crossover.py [--minutes 2] [--tiny]

Both ways run on the same cold operands, forward and dX with LoRA, captured into CUDA graphs and replayed in turn.
Prints the row of this card for kCrossovers in cuda/tuning/library.h: the smallest number of tokens from which the
library is faster on most shapes in both directions. Writes a section of bench/results/CARD.json. Under the kernel
simulator everything runs, but nothing is timed or written.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("QLORA_CUDA_KERNEL", "")  # there before the first call, so that each call reads it

import torch

import qlora_ext
from cuda_operators import SHAPES, SIMULATED, TINY, captured, card_name
from lib.cuda_cases import BF16, RANK, SCALING, Layer, cold_bytes
from lib.harness import Report, Spread, cuda_clock, interleave

OPS = torch.ops.qlora
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
WAYS = {"fused": "sm90" if HOPPER else "tensor_cores", "library": "library"}  # and their kernels


def compare(layer: Layer, operator: str, m: int, seconds: float) -> Spread | None:
    """The library's time over that of the fused kernels; None if nothing is timed."""
    columns = layer.k if operator == "linear_nf4" else layer.n
    x = torch.randn(m, columns, device="cuda", dtype=BF16)
    turns = min(layer.turns, 4)
    calls = {}
    for way, kernel in WAYS.items():
        os.environ["QLORA_CUDA_KERNEL"] = kernel
        if operator == "linear_nf4":
            call = lambda i: OPS.linear_nf4(  # noqa: E731
                x, *layer.ours.at(i).packed_args(), layer.n, None, *layer.lora.at(i), SCALING, 0.0, 0
            )
        else:
            call = lambda i: OPS.linear_nf4_dx(  # noqa: E731
                x, *layer.ours.at(i).packed_args(), layer.k, *layer.lora.at(i), SCALING, 0.0, 0
            )
        calls[way] = captured(call, turns)
    os.environ["QLORA_CUDA_KERNEL"] = ""
    if SIMULATED:
        for replay in calls.values():
            replay(0)
        return None
    return interleave(calls, seconds=seconds, clock=cuda_clock).ratio("library", "fused")


def crossover(ratios: dict[int, list[float]]) -> int | None:
    """The smallest number of tokens from which the library is faster on most shapes; None if it never is."""
    ahead = {m: sum(r < 1.0 for r in found) * 2 > len(found) for m, found in ratios.items()}
    for m in sorted(ahead):
        if all(ahead[later] for later in ahead if later >= m):
            return m
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small shapes: does it work at all")
    parser.add_argument("--minutes", type=float, default=2.0)
    arguments = parser.parse_args()
    if not qlora_ext.build_info()["cuda_available"]:
        sys.exit(f"no CUDA kernels here: {qlora_ext.build_info()['cuda_error'] or 'torch finds no device'}")
    shapes, tokens = (TINY, (70,)) if arguments.tiny else (SHAPES, TOKENS)
    seconds = 0.7 * arguments.minutes * 60 / (len(shapes) * len(tokens) * 2)
    card = card_name()
    report = Report("cuda_crossover", f"Fused kernels or a library's product on {card}", [f"LoRA of rank {RANK}."])
    ratios: dict[int, list[float]] = {m: [] for m in tokens}
    for n, k in shapes:
        layer = Layer(n, k, 1 if arguments.tiny else cold_bytes())
        for m in tokens:
            for operator in ("linear_nf4", "linear_nf4_dx"):
                ratio = compare(layer, operator, m, seconds)
                if ratio is not None:
                    ratios[m].append(ratio.median)
                report.add(operator=operator, N=n, K=k, M=m, **{"library / fused": ratio or "not measured"})
        del layer
        torch.cuda.empty_cache()
    if SIMULATED:
        return
    major, minor = torch.cuda.get_device_capability()
    found = crossover(ratios)
    row = f"{{{10 * major + minor}, {'kNever' if found is None else found}}},  // {card}: measured"
    report.notes.append(f"The row for kCrossovers in cuda/tuning/library.h: `{row}`")
    report.write()


if __name__ == "__main__":
    main()
