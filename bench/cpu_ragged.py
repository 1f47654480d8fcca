"""Ragged shapes, compared with shapes that fit the tiles: picoseconds per multiply-add, forward and input gradient.

    python bench/cpu_ragged.py [--threads 2] [--dtype bfloat16] [--seconds 0.4]

With LoRA of rank 16 and double quantization. Operands stay in the caches, so that the kernels' overhead is visible. The
best of all rounds is reported. Compare each column with the first one.
"""

from __future__ import annotations

import torch

import qlora_ext
from lib import harness

SHAPES = [(1024, 1024), (1023, 1024), (1024, 1000), (1024, 1023)]
TOKENS = [1, 3, 4, 8, 15, 16, 17, 24, 33, 64, 100, 256]
RANK = 16


def picoseconds(m: int, n: int, k: int, dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    w4 = qlora_ext.quantize_nf4((torch.randn(n, k) * 0.02).to(dtype))
    a, b = torch.randn(RANK, k).to(dtype), torch.randn(n, RANK).to(dtype)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    times = harness.interleave(
        {
            "forward": lambda i: torch.ops.qlora.linear_nf4(x, *w4.operands(n, None, a, b, 2.0, 0.0, 0, None)),
            "dX": lambda i: torch.ops.qlora.linear_nf4_dx(dy, *w4.operands(k, a, b, 2.0, 0.0, 0, None)),
        },
        seconds=seconds,
    )
    return times.best("forward") * 1e12 / (m * n * k), times.best("dX") * 1e12 / (m * n * k)


def main() -> None:
    parser = harness.parser(__doc__, seconds=0.4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    harness.keep_freed_memory()
    report = harness.Report(
        f"ragged_{arguments.dtype}_{arguments.threads}_threads",
        f"Ragged shapes on the CPU, {arguments.dtype}",
        ["Picoseconds per multiply-add, forward / dX, N x K in the first row."],
    )
    for m in TOKENS:
        row = {}
        for n, k in SHAPES:
            forward, dx = picoseconds(m, n, k, getattr(torch, arguments.dtype), arguments.seconds)
            row[f"{n}x{k}"] = f"{forward:.1f} / {dx:.1f}"
        report.add(M=m, **row)
    report.write()


if __name__ == "__main__":
    main()
