"""Measures the limits of this machine: memory bandwidth, and the throughput of dense matmuls, on all threads.

    python bench/ceiling.py [--seconds 3] [--threads 2]

bench/lib/report.py compares the other benches with these limits. Memory is read by torch's sum over a tensor that is
larger than the caches. The matmuls are torch's, of large square matrices, per dtype.
"""

from __future__ import annotations

import torch

from lib import harness

SIZE = 2048


def main() -> None:
    parser = harness.parser(__doc__, seconds=3.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    report = harness.Report(
        f"ceiling_{arguments.threads}_threads",
        "Limits of the machine",
        ["From the 10th percentile of the times: GB/s of reading memory, Tflop/s of torch's dense matmul."],
    )
    memory = torch.ones(harness.COLD_BYTES // 4)
    seconds = harness.interleave({"sum": lambda i: memory.sum()}, seconds=arguments.seconds)["sum"]
    report.add(what="reading memory", unit="GB/s", value=memory.nbytes / harness.spread(seconds).low / 1e9)
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        products[str(dtype).removeprefix("torch.")] = lambda i, a=a, b=b: a @ b
    times = harness.interleave(products, seconds=arguments.seconds)
    for name, seconds in times.items():
        report.add(what=f"product, {name}", unit="Tflop/s", value=2 * SIZE**3 / harness.spread(seconds).low / 1e12)
    report.write()


if __name__ == "__main__":
    main()
