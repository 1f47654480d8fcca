"""4-bit layers with LoRA on the CPU: int8 activations against exact ones, and against torch's dense matmul.

    python bench/int8_layers.py [--seconds 1] [--threads 2] [--dtype bfloat16] [--shapes 1536x576,4096x4096]

Ratios are times over those of the exact layer, round by round: lower is better. The formats are NF4 with double
quantization, and those of checkpoints. LoRA has rank 16. Operands are rotated out of the caches.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from formats import copies, random_weight
from lib import harness
from lib.forms import INT8_FORMS
from qlora_ext import _C
from qlora_ext.weight import Weight4bit

TOKENS = {"forward": (1, 4, 8, 64, 1024), "dX": (64, 1024)}
RANK = 16


def measure(report: harness.Report, name: str, n: int, k: int, dtype: torch.dtype, seconds: float) -> None:
    weights: harness.Ring[Weight4bit] = copies(random_weight(INT8_FORMS[name], n, k))
    dense = harness.cold(lambda: torch.randn(n, k).to(dtype), n * k * dtype.itemsize)
    lora = (torch.randn(RANK, k) * 0.02).to(dtype), (torch.randn(n, RANK) * 0.02).to(dtype), 2.0, 0.0, 0, None
    for op, counts in TOKENS.items():
        forward = op == "forward"
        operator = torch.ops.qlora.linear_nf4 if forward else torch.ops.qlora.linear_nf4_dx
        for m in counts:
            x = torch.randn(m, k if forward else n).to(dtype)

            def ours(i: int, activations: str, x=x, operator=operator, of=(n, None) if forward else (k,)) -> Any:
                return operator(x, *weights.at(i).operands(*of, *lora), activations=activations)

            def theirs(i: int, x=x, forward=forward) -> torch.Tensor:
                return x @ (dense.at(i).T if forward else dense.at(i))

            calls: dict[str, harness.Call] = {
                "exact": lambda i: ours(i, "exact"),
                "int8": lambda i: ours(i, "int8"),
                "torch": theirs,
            }
            harness.check_equal(calls["int8"](0), calls["exact"](0).double(), f"{name}, {op}", 0.03)
            clock = harness.thread_clock if torch.get_num_threads() == 1 else harness.wall_clock
            times = harness.interleave(calls, seconds=seconds, clock=clock)
            row: dict[str, Any] = {"format": name, "op": op, "N x K": f"{n}x{k}", "M": m}
            row |= {f"GMAC/s, {way}": m * n * k / times.median(way) / 1e9 for way in ("exact", "int8")}
            report.add(**row, int8=times.ratio("int8", "exact"), torch=times.ratio("torch", "exact"))


def main() -> None:
    parser = harness.parser(__doc__, seconds=1.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--shapes", default="1536x576,4096x4096", help="N x K of the weights (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    harness.keep_freed_memory()
    torch.manual_seed(0)
    forced = [_C.cpu_isa()] if "QLORA_CPU_ISA" in os.environ else []
    report = harness.Report(
        "_".join(["int8_layers", arguments.dtype, f"{arguments.threads}_threads", *forced]),
        f"Int8 activations against exact ones on the CPU, {arguments.dtype}",
        [
            "Time over that of the exact layer, median (10th to 90th percentile), lower is better.",
            "Both have LoRA of rank 16; torch is the dense matmul without LoRA.",
        ],
    )
    for name in INT8_FORMS:
        for shape in arguments.shapes.split(","):
            n, k = (int(part) for part in shape.split("x"))
            measure(report, name, n, k, getattr(torch, arguments.dtype), arguments.seconds)
    report.write()


if __name__ == "__main__":
    main()
