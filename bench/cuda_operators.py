"""Times every CUDA operator and its peers on this machine's GPU, and writes one table.

    python bench/cuda_operators.py [--tiny] [--minutes 7.5]

Results are checked before anything is timed. Weights and adapters rotate through five times the L2. Contenders are
captured into CUDA graphs, except for quantizing and training steps, so that what is timed is the card and not Python.
They are replayed in turn; "x the time" is the median over rounds of a peer's time divided by ours, with its 10th and
90th percentile. Writes a section of bench/results/CARD.json. Under the kernel simulator everything runs and is checked,
and nothing is timed.

Layers have NF4 weights with double quantization and LoRA of rank 16; "variant" names what differs. The low-rank
products h and g take what `linear_nf4_dlora, h and g computed` takes more than `linear_nf4_dlora`. "SM MHz" is the
card's clock while the row was measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lib.cuda_cases import PLAIN, VARIANTS, Case, Layer, Variant, cold_bytes
from lib.cuda_grouped_cases import Experts
from lib.cuda_timing import NOT_MEASURED, SHAPES, SIMULATED, TINY, Failures, captured, card_name, require_cuda
from lib.harness import Report, check_equal, cuda_clock, interleave
from lib.nvidia_smi import Clocks

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
TRAINING_TOKENS = (512, 1024, 4096)
VARIANT_SHAPE, VARIANT_TOKENS = (4096, 4096), (1, 64, 1024)
EXPERTS, EXPERT_ROWS = ((8, 14336, 4096), (64, 1536, 2048)), (16, 512, 8192)  # Mixtral, and smaller experts
TINY_TOKENS, TINY_EXPERTS, TINY_ROWS = (1, 16, 70), ((4, 96, 192),), (20,)
TOLERANCE = {"quantize": 2e-3, "dequantize": 4e-3}  # bfloat16 rounds to 2^-9; peers break ties of codes their own way
LINEAR_TOLERANCE = 1e-2
UNCAPTURED = ("training step", "quantize")  # autograd runs as for users; bitsandbytes copies a table from the host
UNCHECKED = ("bitsandbytes, no LoRA", "bf16, no dropout")  # another product


def check(case: Case) -> None:
    tolerance = TOLERANCE.get(case.operator, LINEAR_TOLERANCE)
    expected = case.expected(0)
    for name, call in case.calls.items():
        if name in UNCHECKED or (name == "bf16" and "dlora" not in case.operator):  # bf16: before quantizing
            continue
        got = call(0)
        pairs = [(got, expected)] if isinstance(expected, Tensor) else zip(got, expected, strict=True)
        for one, other in pairs:
            what = f"{name}, {case.operator} {case.n} x {case.k}, {case.m} tokens"
            check_equal(one.detach(), other, what, tolerance)


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
    if case.operator in UNCAPTURED:
        calls, per_call = case.calls, 1
    else:
        calls = {name: captured(call, case.turns) for name, call in case.calls.items()}
        per_call = case.turns
    if SIMULATED:
        for call in calls.values():
            call(0)
        return {"us": NOT_MEASURED}
    times = interleave(calls, seconds=seconds, clock=cuda_clock)
    ours = times.median("ours") / per_call
    row: dict[str, object] = {
        "us": ours * 1e6,
        "of copy bandwidth": f"{case.bytes / ours / ceiling['bytes']:.0%}",
        "of matmul peak": f"{case.flops / ours / ceiling['flops']:.0%}" if case.flops else "",
    }
    return row | {f"{name}, x the time": times.ratio(name, "ours") for name in case.calls if name != "ours"}


Make = Callable[[], Case]


def cases(tiny: bool) -> Iterator[tuple[str, Make]]:
    """Every case with the name of its variant. A case is made when it is its turn; a layer lives for its cases."""
    cold = 1 if tiny else cold_bytes()
    tokens, training = (TINY_TOKENS, TINY_TOKENS[-1:]) if tiny else (TOKENS, TRAINING_TOKENS)
    for n, k in TINY if tiny else SHAPES:
        layer = Layer(n, k, cold)
        yield from ((PLAIN.name, make) for make in (layer.quantize, layer.dequantize))
        for operator in (layer.forward, layer.input_gradient):
            yield from ((PLAIN.name, lambda o=operator, m=m: o(m)) for m in tokens)
        for operator in (layer.lora_gradients, layer.low_rank, layer.training_step):
            yield from ((PLAIN.name, lambda o=operator, m=m: o(m)) for m in training)
    some = TINY_TOKENS[-1:] if tiny else VARIANT_TOKENS
    for variant in VARIANTS:
        layer = Layer(*(TINY[0] if tiny else VARIANT_SHAPE), cold, variant)
        for operator in operators(layer, variant):
            yield from ((variant.name, lambda o=operator, m=m: o(m)) for m in some)
    for experts, n, k in TINY_EXPERTS if tiny else EXPERTS:
        stack = Experts(experts, n, k)
        for rows in TINY_ROWS if tiny else EXPERT_ROWS:
            yield from ((f"{experts} experts", make) for make in stack.cases(rows))


def operators(layer: Layer, variant: Variant) -> list[Callable[[int], Case]]:
    """The operators that a variant changes: the adapters' gradients do not read the weight."""
    both: list[Callable[[int], Case]] = [layer.forward, layer.input_gradient]
    return both if variant.form != PLAIN.form else [*both, layer.lora_gradients, layer.low_rank]


def count_of_cases() -> int:
    plain = len(SHAPES) * (2 + 2 * len(TOKENS) + 3 * len(TRAINING_TOKENS))
    changed = sum(2 if v.form != PLAIN.form else 4 for v in VARIANTS) * len(VARIANT_TOKENS)
    return plain + changed + 3 * len(EXPERTS) * len(EXPERT_ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small shapes: does it work at all")
    parser.add_argument("--minutes", type=float, default=7.5, help="what does not fit is reported as not measured")
    arguments = parser.parse_args()
    require_cuda()

    start = time.perf_counter()
    torch.manual_seed(0)
    card = card_name()
    notes = [" ".join(paragraph.split()) for paragraph in __doc__.split("\n\n")[2:4]]
    report = Report("cuda_operators", f"CUDA operators on {card}", notes)
    report.machine["gpu"] = card
    ceiling = {} if SIMULATED else ceilings()
    if ceiling:
        copy, matmul = ceiling["bytes"] / 1e12, ceiling["flops"] / 1e12
        report.notes.append(f"Ceilings measured here: copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s.")
    seconds = 0.45 * arguments.minutes * 60 / count_of_cases()  # the rest is for checks and captures
    clocks, failures = Clocks(), Failures()
    with failures.caught("making the operands"):
        for variant, make in cases(arguments.tiny):
            if not SIMULATED and time.perf_counter() - start > arguments.minutes * 60:
                report.notes.append(f"Time ran out after {len(report.rows)} rows; the others are not measured.")
                print(report.notes[-1])
                break
            with failures.caught(f"after {len(report.rows)} rows"):
                case = make()
                check(case)
                row = {"operator": case.operator, "variant": variant, "N": case.n, "K": case.k, "M": case.m or ""}
                clocks.row()  # what came before
                report.add(**row, **measure(case, ceiling, seconds), **clocks.row())
    if not SIMULATED:
        report.write()
    failures.exit()


if __name__ == "__main__":
    main()
