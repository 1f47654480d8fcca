"""The number of tokens from which decoding and a library's matmul are faster than the fused kernels on this GPU.

    python bench/cuda_crossover.py [--minutes 2] [--tiny]

Both ways run on the same cold operands, forward and dX with LoRA, captured into CUDA graphs and replayed in turn.
Prints the constant of this card and its file: the smallest number of tokens from which the library is faster on most
shapes in both directions. Shapes with few outputs and with a last wave that is nearly empty are among them. Writes a
section of bench/results/CARD.json. Under the kernel simulator everything runs, but nothing is timed or written.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("QLORA_CUDA_KERNEL", "")  # there before the first call, so that each call reads it

import torch

from lib.cuda_cases import BF16, OPS, RANK, Layer, cold_bytes
from lib.cuda_timing import NOT_MEASURED, SIMULATED, TINY, Failures, captured, card_name, require_cuda
from lib.harness import Report, Spread, cuda_clock, interleave
from lib.nvidia_smi import Clocks

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (8192, 8192))
TOKENS = (33, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)


def fused_kernels(capability: tuple[int, int]) -> list[str]:
    """Those that the library competes with. The constant is that of the first one."""
    if capability == (9, 0):
        return ["sm90"]
    # Which of the two runs depends on the shape, by models (is_ahead in cuda/tuning/sm100.h).
    return ["tensor_cores", "sm100"] if capability in ((10, 0), (10, 3)) else ["tensor_cores"]


def setting(capability: tuple[int, int], found: int | None, card: str) -> str:
    """The constant that this measurement sets, with its file, and the line to write there."""
    major, minor = capability
    if capability == (9, 0):
        most = "std::numeric_limits<int64_t>::max()" if found is None else found - 1
        where, line = "kMostTokens in cuda/tuning/sm90.h", f"inline constexpr int64_t kMostTokens = {most};"
    else:
        tokens = "kNever" if found is None else found
        where, line = "kCrossovers in cuda/tuning/library.h", f"{{{10 * major + minor}, {tokens}}},"
    return f"{where}: `{line}  // {card}: measured`"


def compare(layer: Layer, operator: str, m: int, seconds: float) -> dict[str, Spread | None]:
    """The library's time over that of each of the fused kernels; None if nothing is timed."""
    x = torch.randn(m, layer.k if operator == "linear_nf4" else layer.n, device="cuda", dtype=BF16)
    args = layer.forward_args if operator == "linear_nf4" else layer.dx_args
    run = getattr(OPS, operator)
    turns = min(layer.turns, 4)
    fused = fused_kernels(torch.cuda.get_device_capability())
    calls = {}
    for kernel in (*fused, "library"):
        os.environ["QLORA_CUDA_KERNEL"] = kernel
        calls[kernel] = captured(lambda i: run(*args(i, x)), turns)
    os.environ["QLORA_CUDA_KERNEL"] = ""
    if SIMULATED:
        for replay in calls.values():
            replay(0)
        return dict.fromkeys(fused)
    times = interleave(calls, seconds=seconds, clock=cuda_clock)
    return {kernel: times.ratio("library", kernel) for kernel in fused}


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
    require_cuda()
    shapes, tokens = (TINY, (70,)) if arguments.tiny else (SHAPES, TOKENS)
    seconds = 0.7 * arguments.minutes * 60 / (len(shapes) * len(tokens) * 2)
    card = card_name()
    report = Report("cuda_crossover", f"Fused kernels or a library's product on {card}", [f"LoRA of rank {RANK}."])
    clocks, failures = Clocks(), Failures()
    ratios: dict[int, list[float]] = {m: [] for m in tokens}
    for n, k in shapes:
        layer = Layer(n, k, 1 if arguments.tiny else cold_bytes())
        for m in tokens:
            for operator in ("linear_nf4", "linear_nf4_dx"):
                clocks.row()
                with failures.caught(f"{operator} of {n} x {k}, {m} tokens"):
                    found = compare(layer, operator, m, seconds)
                    row = {"operator": operator, "N": n, "K": k, "M": m}
                    row |= {f"library / {kernel}": ratio or NOT_MEASURED for kernel, ratio in found.items()}
                    report.add(**row, **clocks.row())
                    first, *_ = found.values()
                    if first is not None:
                        ratios[m].append(first.median)
        del layer
        torch.cuda.empty_cache()
    if not SIMULATED:
        report.notes.append(setting(torch.cuda.get_device_capability(), crossover(ratios), card))
        print(report.notes[-1])
        report.write()
    failures.exit()


if __name__ == "__main__":
    main()
