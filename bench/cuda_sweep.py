"""Times the kernels that can be forced against the one that is chosen, and says what to change in cuda/tuning.

    python bench/cuda_sweep.py [--minutes 2] [--tiny]

QLORA_CUDA_KERNEL forces every kernel with several tiles and splits, on the same cold operands as the planner's choice.
All are captured into CUDA graphs and replayed in turn, and their results are compared first. A row has the best forced
choice, its time over that of the planner's choice, and, if it is ahead beyond the noise, what decides between the two.
It also has the time of the planner's choice with QLORA_CUDA_START=in_order, which turns early starts off, over the time
with them; the results have the same bits.
Writes a section of bench/results/CARD.json. Under the kernel simulator everything runs once, and nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("QLORA_CUDA_KERNEL", "")  # there before the first call, so that each call reads them
os.environ.setdefault("QLORA_CUDA_START", "")
os.environ["QLORA_PRINT_KERNELS"] = "1"

import torch

from lib.cuda_cases import BF16, OPS, Layer, Variant, cold_bytes
from lib.cuda_choices import candidates, printed_choice, stderr_of, to_change
from lib.cuda_timing import NOT_MEASURED, SIMULATED, Failures, captured, card_name, require_cuda
from lib.harness import Report, check_equal, cuda_clock, interleave
from lib.nvidia_smi import Clocks

FORCED, START = "QLORA_CUDA_KERNEL", "QLORA_CUDA_START"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 16, 32, 33, 64, 128, 256, 1024)
TRAINING_TOKENS, RANKS = (512, 4096), (16, 64)  # of LoRA's gradients
CHOSEN, IN_ORDER = "the planner's choice", "the same in order"
AHEAD = 0.97  # a best choice within 3% is noise
TOLERANCE = 1e-2

Problem = tuple[str, int, int, int, int]  # operator, N, K, M and rank


def problems(tiny: bool) -> Iterator[Problem]:
    shapes, tokens, training = (((128, 512),), (5, 40), (70,)) if tiny else (SHAPES, TOKENS, TRAINING_TOKENS)
    for n, k in shapes:
        for m in tokens:
            yield from ((operator, n, k, m, 16) for operator in ("linear_nf4", "linear_nf4_dx"))
        yield from (("linear_nf4_dlora", n, k, m, rank) for rank in RANKS for m in training)


def call_of(layer: Layer, operator: str, m: int) -> Callable[[int], Any]:
    x, dy = (torch.randn(m, columns, device="cuda", dtype=BF16) for columns in (layer.k, layer.n))
    if operator == "linear_nf4":
        return lambda i: OPS.linear_nf4(*layer.forward_args(i, x))
    if operator == "linear_nf4_dx":
        return lambda i: OPS.linear_nf4_dx(*layer.dx_args(i, dy))
    return lambda i: OPS.linear_nf4_dlora(dy, x, *layer.lora_args(i))[0]


def sweep(layer: Layer, problem: Problem, seconds: float) -> dict[str, object]:
    operator, _, _, m, _ = problem
    call = call_of(layer, operator, m)
    results: list[torch.Tensor] = []
    run = lambda: results.append(call(0))  # noqa: E731
    chosen = printed_choice(run)
    turns = min(layer.turns, 4)
    calls = {CHOSEN: captured(call, turns)}
    os.environ[START] = "in_order"
    try:
        run()
        check_equal(results.pop(), results[0], f"{operator}, {m} tokens, in order")
        calls[IN_ORDER] = captured(call, turns)
    finally:
        os.environ[START] = ""
    refused = 0
    for forced in candidates(operator):
        os.environ[FORCED] = forced
        try:
            stderr_of(run)  # not a line for each
        except ValueError:  # another card's kernel, or more splits than the sum has parts
            refused += 1
            continue
        else:
            check_equal(results.pop(), results[0], f"{operator}, {m} tokens, {forced}", TOLERANCE)
            calls[forced] = captured(call, turns)
        finally:
            os.environ[FORCED] = ""
    row: dict[str, object] = {"chosen": chosen, "tried": len(calls) - 2, "refused": refused}
    if SIMULATED:
        for replay in calls.values():
            replay(0)
        return {**row, "best forced": NOT_MEASURED}
    times = interleave(calls, seconds=seconds, least_sample=2e-4, clock=cuda_clock)
    best = min((name for name in calls if name not in (CHOSEN, IN_ORDER)), key=times.median, default=CHOSEN)
    ratio = times.ratio(best, CHOSEN)
    row |= {"us": times.median(CHOSEN) / turns * 1e6, "best forced": best, "best / chosen": ratio}
    row["in order / chosen"] = times.ratio(IN_ORDER, CHOSEN)
    return {**row, "to change": to_change(operator, chosen, best) if ratio.high < AHEAD else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one small shape: does it work at all")
    parser.add_argument("--minutes", type=float, default=2.0, help="what does not fit is reported as not measured")
    arguments = parser.parse_args()
    require_cuda()
    start = time.perf_counter()
    todo = list(problems(arguments.tiny))
    seconds = 0.4 * arguments.minutes * 60 / len(todo)  # the rest is for captures
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    report = Report("cuda_sweep", f"Forced kernels against the chosen ones on {card_name()}", notes)
    clocks, failures = Clocks(), Failures()
    layers: dict[tuple[int, int, int], Layer] = {}
    for problem in todo:
        if not SIMULATED and time.perf_counter() - start > arguments.minutes * 60:
            report.notes.append(f"Time ran out after {len(report.rows)} of {len(todo)} problems.")
            print(report.notes[-1])
            break
        operator, n, k, m, rank = problem
        with failures.caught(f"{operator} of {n} x {k}, {m} tokens, rank {rank}"):
            if (n, k, rank) not in layers:
                cold = 1 if arguments.tiny else cold_bytes()
                layers = {(n, k, rank): Layer(n, k, cold, Variant(rank=rank))}  # the layer before is freed
            clocks.row()
            found = sweep(layers[n, k, rank], problem, seconds)
            report.add(operator=operator, N=n, K=k, M=m, rank=rank, **found, **clocks.row())
    if not SIMULATED:
        report.write()
    failures.exit()


if __name__ == "__main__":
    main()
