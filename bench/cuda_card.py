"""A record of the card, for whoever reads its results later: what it is, how it is set, and how fast it copies.

    python bench/cuda_card.py [--tiny]

Clocks, power, driver, ECC and MIG by nvidia-smi, L2 and SMs by torch, clusters that run at once by a small program
that nvcc compiles, and torch's copies by size. What cannot be found says why. Writes a section of
bench/results/CARD.json. Under the kernel simulator nothing is timed or written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import torch

import cuda_micro
from lib import nvidia_smi
from lib.cuda_timing import NOT_MEASURED, SIMULATED, captured, card_name
from lib.harness import Report, cuda_clock, interleave

COPIES = tuple(1 << power for power in range(16, 31, 2))  # 64 KB to 1 GB
TINY_COPIES = (1 << 10, 1 << 12)
ATTRIBUTES = ("multi_processor_count", "L2_cache_size", "total_memory", "shared_memory_per_block_optin")

Row = dict[str, object]


def properties() -> Iterator[Row]:
    if nvidia_smi.command() is None:
        yield {"what": "clocks, power, driver, ECC and MIG", "value": nvidia_smi.MISSING}
    else:
        yield from ({"what": f"nvidia-smi {field}", "value": nvidia_smi.query(field)} for field in nvidia_smi.FIELDS)
    device = torch.cuda.get_device_properties(0)
    yield {"what": "compute capability", "value": f"{device.major}.{device.minor}"}
    for name in ATTRIBUTES:
        yield {"what": name, "value": getattr(device, name, "unknown to this torch")}
    yield {"what": "CUDA of torch", "value": torch.version.cuda}
    for name in ("QLORA_CUDA_START", "QLORA_CUDA_KERNEL"):
        yield {"what": name, "value": os.environ.get(name) or "not set"}


def clusters() -> Iterator[Row]:
    try:
        yield from cuda_micro.rows("clusters")
    except RuntimeError as error:
        yield {"what": "active clusters", "value": f"{NOT_MEASURED}: {str(error).splitlines()[0]}"}


def copies(sizes: tuple[int, ...]) -> Iterator[Row]:
    """Bytes read and written per second. Sizes below half of L2 show the rate of L2."""
    source = torch.zeros(max(sizes), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for size in sizes:
        turns = max(1, min(100, (256 << 20) // size))
        replay = captured(lambda _, n=size: target[:n].copy_(source[:n]), turns)
        row: Row = {"what": f"copy of {size >> 10} KB", "unit": "TB/s"}
        if SIMULATED:
            replay(0)
            yield {**row, "value": NOT_MEASURED}
        else:
            seconds = interleave({"copy": replay}, seconds=0.3, clock=cuda_clock).best("copy") / turns
            yield {**row, "value": 2 * size / seconds / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small copies")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    report = Report("cuda_card", f"Record of {card_name()}")
    clocks = nvidia_smi.Clocks()
    for part in (properties(), clusters(), copies(TINY_COPIES if arguments.tiny else COPIES)):
        for row in part:
            report.add(**row)
    report.add(what="SM clock during the copies", value=clocks.row()["SM MHz"], unit="MHz")
    if not SIMULATED:
        report.write()


if __name__ == "__main__":
    main()
