"""Random problems of every operator on CUDA, compared with the oracle: a child of test_cuda.py.

All problems of a campaign run sequentially in one process, so that the state that a launch leaves (workspaces, tickets,
reused memory) reaches the next. A fault may depend on the previous problems: to repeat number 12 of seed 7 with them,
run ``PYTHONPATH=tests/lib python tests/attack/cuda_problems.py cuda 7 0 13``.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

from campaign import Problem, serve
from oracle import disagreement
from random_problems import CUDA_KERNELS, DTYPES, KERNEL_VARIABLE, OPS, Draw, bits, by_name, call_by_kernel, draw

# Limits for the kernel simulator, which interprets each thread; a GPU could run larger problems.
MOST_PRODUCTS = 60_000
ROWS = [(0, 4), (1, 16), (5, 48), (17, 64), (49, 130)]
MANY_ROWS = [(32, 130), (129, 513)]
KERNELS = ["", "", "", *CUDA_KERNELS]  # values of QLORA_CUDA_KERNEL, which each call reads


def on_cuda(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def problem(rng: random.Random, rows: list[tuple[int, int]]) -> Problem:
    d = Draw(rng, MOST_PRODUCTS * (4 if rows is MANY_ROWS else 1), rows)
    d.dtypes = DTYPES  # there is no float64 kernel on CUDA
    name, arguments = draw(d, rng)
    kernel = d.choose("kernel", KERNELS) if "linear" in name else ""
    again, replays = rng.random() < 0.25, rng.random() < 0.125

    def run() -> str | None:
        operator, moved = getattr(OPS, name), [on_cuda(a) for a in arguments]
        try:
            out = call_by_kernel(operator, moved, KERNEL_VARIABLE["cuda"], kernel)
            if out is None:  # the kernel does not take the problem, so that it runs with the chosen one
                out = call_by_kernel(operator, moved, KERNEL_VARIABLE["cuda"], "")
            first = [t.cpu() for t in bits(out)]
            if again and not all(map(torch.equal, first, (t.cpu() for t in bits(operator(*moved))))):
                return "other bits at the second call"
            if replays and (wrong := replayed(operator, moved, first)):
                return wrong
        except torch.AcceleratorError as error:
            print(f"wrong: {error}", flush=True)
            sys.exit(1)  # results of this process on a GPU are invalid after a CUDA error
        back = out.cpu() if isinstance(out, Tensor) else tuple(t.cpu() for t in out)
        if "linear" not in name and not all(map(torch.equal, first, bits(operator(*arguments)))):
            return "other bits than on the CPU"
        return disagreement(name, by_name(name, arguments), back)

    return f"{name} {' '.join(d.said)}", run


def replayed(operator: Any, moved: list[Any], first: list[Tensor]) -> str | None:
    """A captured call, replayed twice with another call in between."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operator(*moved)
    for _ in range(2):
        graph.replay()
        if not all(map(torch.equal, first, (t.cpu() for t in bits(out)))):
            return "other bits from a captured graph"
        operator(*moved)
    return None


if __name__ == "__main__":
    assert torch.cuda.is_available(), "no CUDA device"
    serve({"cuda": lambda rng: problem(rng, ROWS), "cuda_many": lambda rng: problem(rng, MANY_ROWS)})
