"""How evenly threads share the products of a model: the table in docs/cpu_roofline.md, which needs no such machine.

    python bench/thread_table.py

Efficiency is the work of one thread over that of the busiest of N threads, times N, for all linear layers of a block.
The cuts are those of the kernels (`_C.task_grid`); work counts multiply-adds, decoding and packing.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_ext import _C

# The layers of a block: rows, columns, and how many there are.
MODELS = {
    "SmolLM2-135M": [(576, 576, 2), (192, 576, 2), (1536, 576, 2), (576, 1536, 1)],
    "Llama 1.1B": [(2048, 2048, 2), (256, 2048, 2), (5632, 2048, 2), (2048, 5632, 1)],
    "Llama 7B": [(4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1)],
}
OPERATORS = {"forward": "linear_nf4", "dX": "linear_nf4_dx", "dlora": "linear_nf4_dlora"}
THREADS = (2, 4, 8, 16, 32, 64, 128, 192)


def efficiency(
    op: str, threads: int, m: int, layers: Sequence[tuple[int, int, int]], lanes: int = 8, accumulators: int = 12
) -> float:
    total = longest = 0
    for n, k, count in layers:
        summed = {"linear_nf4": k, "linear_nf4_dx": n, "linear_nf4_dlora": m}[op]
        total += count * summed * int(_C.task_grid(op, 1, m, n, k, lanes, accumulators)["total"])
        longest += count * summed * int(_C.task_grid(op, threads, m, n, k, lanes, accumulators)["critical_path"])
    return total / (threads * longest)


def table() -> str:
    rows = [f"| model | operator | tokens | {' | '.join(f'{threads}' for threads in THREADS)} |"]
    rows.append("| --- " * (3 + len(THREADS)) + "|")
    for model, layers in MODELS.items():
        for name, op in OPERATORS.items():
            for m in (64, 512, 4096) if op != "linear_nf4_dlora" else (512,):
                figures = " | ".join(f"{efficiency(op, threads, m, layers):.2f}" for threads in THREADS)
                rows.append(f"| {model} | {name} | {m if op != 'linear_nf4_dlora' else 'any'} | {figures} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
