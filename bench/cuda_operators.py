"""Times every CUDA operator and its peers on this machine's GPU, and writes one table.

    python bench/cuda_operators.py [--tiny] [--minutes 7.5]

Results are checked before anything is timed. Weights and adapters rotate through five times the L2. Contenders are
captured into CUDA graphs, so that what is timed is the card and not Python, and replayed in turn; "x the time" is the
median over rounds of a peer's time divided by ours, with its 10th and 90th percentile. Writes
a section of bench/results/CARD.json. Under the kernel simulator everything runs and is checked, and nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch

from lib.cuda_cases import Case, Layer, cold_bytes
from lib.harness import Report, check_equal, cuda_clock, interleave

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))  # Llama 3 8B and 70B
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
TRAINING_TOKENS = (512, 1024, 4096)
TINY = ((256, 512), (96, 192))
NOT_MEASURED = "not measured"
SIMULATED = "CUDASIM_TORCH_LIBRARY" in os.environ
TOLERANCE = {"quantize": 2e-3, "dequantize": 4e-3}  # bfloat16 rounds to 2^-9; peers break ties of codes their own way
LINEAR_TOLERANCE = 1e-2


def card_name() -> str:
    return "no card, kernel simulator" if SIMULATED else torch.cuda.get_device_name()


def captured(call: Callable[[int], object], turns: int) -> Callable[[int], object]:
    """One replay of a CUDA graph of calls 0 .. turns - 1."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # library handles and workspaces come into being outside of the capture
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(turns):
            call(i)

    def replay(_: int) -> object:
        return graph.replay()

    return replay


def check(case: Case) -> None:
    tolerance = TOLERANCE.get(case.operator, LINEAR_TOLERANCE)
    for name, call in case.calls.items():
        if "no LoRA" not in name and name != "bf16":  # bf16 multiplies the weight before it was quantized
            what = f"{name}, {case.operator} {case.n} x {case.k}, {case.m} tokens"
            check_equal(call(0).detach(), case.expected(0), what, tolerance)


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy, and flops per second of a large bfloat16 matmul, both by torch."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    times = interleave(
        {"copy": lambda _: target.copy_(source), "matmul": lambda _: torch.mm(a, a, out=out)},
        seconds=2.0,
        clock=cuda_clock,
    )
    return {"bytes": 2 * source.numel() / times.best("copy"), "flops": 2 * 8192.0**3 / times.best("matmul")}


def measure(case: Case, ceiling: dict[str, float], seconds: float) -> dict[str, object]:
    if case.operator == "training step":  # autograd runs as it does for users: not captured
        calls, per_call = case.calls, 1
    else:
        calls = {name: captured(call, case.turns) for name, call in case.calls.items()}
        per_call = case.turns
    times = interleave(calls, seconds=seconds, clock=cuda_clock)
    ours = times.median("ours") / per_call
    row: dict[str, object] = {
        "us": ours * 1e6,
        "of copy bandwidth": f"{case.bytes / ours / ceiling['bytes']:.0%}",
        "of matmul peak": f"{case.flops / ours / ceiling['flops']:.0%}" if case.flops else "",
    }
    return row | {f"{name}, x the time": times.ratio(name, "ours") for name in case.calls if name != "ours"}


def cases(layer: Layer, tiny: bool) -> list[Callable[[], Case]]:
    tokens, training = ((1, 16, 70), (70,)) if tiny else (TOKENS, TRAINING_TOKENS)
    made: list[Callable[[], Case]] = [layer.quantize, layer.dequantize]
    made += [lambda m=m: layer.forward(m) for m in tokens]
    made += [lambda m=m: layer.input_gradient(m) for m in tokens]
    made += [lambda m=m: layer.training_step(m) for m in training]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small shapes: does it work at all")
    parser.add_argument("--minutes", type=float, default=7.5, help="what does not fit is reported as not measured")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: bench/cpu_codec.py and bench/cpu_linear.py time the CPU")

    start = time.perf_counter()
    torch.manual_seed(0)
    shapes = TINY if arguments.tiny else SHAPES
    card = card_name()
    report = Report("cuda_operators", f"CUDA operators on {card}", [__doc__.split("\n\n")[2].replace("\n", " ")])
    report.machine["gpu"] = card
    ceiling = {} if SIMULATED else ceilings()
    if ceiling:
        copy, matmul = ceiling["bytes"] / 1e12, ceiling["flops"] / 1e12
        report.notes.append(f"Ceilings measured here: copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s.")
    per_layer = len(TOKENS) * 2 + len(TRAINING_TOKENS) + 2
    seconds = 0.45 * arguments.minutes * 60 / (len(shapes) * per_layer)  # the rest is for checks and captures
    for n, k in shapes:
        layer = Layer(n, k, 1 if arguments.tiny else cold_bytes())
        for make in cases(layer, arguments.tiny):
            case = make()
            check(case)
            late = time.perf_counter() - start > arguments.minutes * 60
            timed = {"us": NOT_MEASURED} if SIMULATED or late else measure(case, ceiling, seconds)
            report.add(operator=case.operator, N=n, K=k, M=case.m or "", **timed)
        del layer
        torch.cuda.empty_cache()
    if not SIMULATED:
        report.write()


if __name__ == "__main__":
    main()
