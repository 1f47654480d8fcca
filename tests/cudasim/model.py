#!/usr/bin/env python3
"""Estimates the least time of launches on a real card, from the counters of a profile.

    tests/cudasim/cudasim --profile launches.jsonl COMMAND
    python tests/cudasim/model.py launches.jsonl --gpu h100 [--gpcs 18,18,16,16,16,16,16,16]

For every kernel's last launch, it computes how long each resource of the card is busy; the largest of these times is
the estimate. A model finds what bounds a kernel and compares variants. It does not measure: the rates are data sheets'
and microbenchmarks', and overlap, latency chains and the memory system's queues are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Launch = dict[str, Any]

SECTOR = 32
FIXED_US = 2.0  # a kernel that does nothing
LOADS_IN_FLIGHT = 4  # per warp


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card. Rates are per SM and clock unless their comment says otherwise."""

    name: str
    gpcs: Sequence[int]  # the SMs of each GPC: a cluster's CTAs run within one
    ghz: float  # under load
    dram: float  # bytes per ns that a copy reaches, of the whole card
    l2: float  # bytes per ns, of the whole card
    dram_cycles: int  # latency of a load that misses L2
    mma_flops: int  # 16-bit operands, float32 sums, mma.sync
    l2_port: int = 64  # bytes from L2 to one SM
    threads: int = 2048  # resident at most
    blocks: int = 32
    shared: int = 228 << 10  # bytes, 1 KiB of them reserved per CTA
    fp32: float = 4  # warp instructions
    half: float = 4
    wgmma_flops: int = 0
    tcgen05_flops: int = 0
    integer: float = 2
    convert: float = 2
    special: float = 0.5
    exchange: float = 1  # shfl, vote
    constant: float = 1  # addresses
    issue: int = 4

    @property
    def multiprocessors(self) -> int:
        return sum(self.gpcs)


# Clocks, widths and throughputs: NVIDIA's data sheets and the throughput table of the CUDA programming guide. DRAM: 91,
# 87 and 92% of the peak. L2's rates, the latencies and mma.sync's 5/8 of wgmma's rate on Hopper are rough.
# Which SMs of a GPC work differs from card to card. The H100's are those of a card with 31 clusters of 4 and 15 of 8;
# with 18,18,16,16,16,16,16,16 it has 32 and 16. The B200's GPCs, L2, latency and rate of mma.sync are rough.
GPUS = {
    "h100": Gpu(
        name="H100 SXM",
        gpcs=(18, 18, 18, 16, 16, 16, 16, 14),
        ghz=1.755,
        dram=3050,
        l2=5600,
        dram_cycles=479,
        mma_flops=2560,
        wgmma_flops=4096,
    ),
    "b200": Gpu(
        name="B200",
        gpcs=(20, 20, 18, 18, 18, 18, 18, 18),
        ghz=1.85,
        dram=7300,
        l2=10000,
        dram_cycles=800,
        mma_flops=2048,
        tcgen05_flops=8192,
    ),
    "a100": Gpu(
        name="A100 SXM 80 GB",
        gpcs=(16, 16, 16, 16, 16, 14, 14),
        ghz=1.41,
        dram=1780,
        l2=4600,
        dram_cycles=466,
        shared=164 << 10,
        fp32=2,
        mma_flops=2048,
    ),
    "4090": Gpu(
        name="RTX 4090",
        gpcs=(12, 12, 12, 12, 12, 12, 12, 12, 12, 10, 10),
        ghz=2.52,
        dram=930,
        l2=5000,
        dram_cycles=542,
        threads=1536,
        blocks=24,
        shared=100 << 10,
        half=2,
        mma_flops=512,
    ),
}


@dataclasses.dataclass(frozen=True)
class Waves:
    """How a grid fills the card."""

    resident: int  # CTAs per SM
    clusters: int  # resident at once
    waves: int
    busiest: int  # CTAs that the busiest SM runs, one after the other or beside each other
    used: int  # SMs that run any


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Microseconds by resource, and how the grid fills the card."""

    bounds: dict[str, float]
    waves: Waves

    @property
    def limit(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def us(self) -> float:
        return self.bounds[self.limit] + FIXED_US


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def warps_of(launch: Launch) -> int:
    return math.ceil(math.prod(launch["block"]) / 32)


def resident_blocks(launch: Launch, gpu: Gpu) -> int:
    """How many of the launch's CTAs an SM of this card has room for."""
    warps = warps_of(launch)
    by_registers = 65536 // 4 // round_up(max(launch["registers"], 16) * 32, 256) * 4 // warps
    shared = round_up(launch["static_shared_bytes"] + launch["dynamic_shared_bytes"] + 1024, 128)
    return max(1, min(gpu.threads // (32 * warps), gpu.blocks, by_registers, gpu.shared // shared))


def waves_of(launch: Launch, gpu: Gpu) -> Waves:
    """CTAs are dealt out by clusters, of which a GPC holds a whole number."""
    size = math.prod(launch.get("cluster", (1, 1, 1)))
    resident = resident_blocks(launch, gpu)
    slots = sum(sms * resident // size for sms in gpu.gpcs)
    if slots == 0:
        raise ValueError(f"no GPC of {gpu.name} has room for a cluster of {size} CTAs of {launch['kernel']}")
    blocks = math.prod(launch["grid"])
    clusters = blocks // size
    busiest = math.ceil(clusters * resident / slots)
    return Waves(
        resident=resident,
        clusters=slots,
        waves=math.ceil(clusters / slots),
        busiest=busiest,
        used=min(blocks, slots * size // resident),
    )


def estimate(launch: Launch, gpu: Gpu) -> Estimate:
    blocks, warps, waves = math.prod(launch["grid"]), warps_of(launch), waves_of(launch, gpu)
    us_per_cycle = 1e-3 / gpu.ghz

    def count(*names: str) -> int:
        return sum(launch.get(name, 0) for name in names)

    # Clusters that take one tile after another differ in their work: with 64 tiles on 31 clusters, some take three.
    size = math.prod(launch.get("cluster", (1, 1, 1)))
    longest = count("busiest_cluster_instructions") / size / max(1, count("warp_instructions"))
    share = max(waves.busiest / blocks, longest)

    def on_multiprocessor(work: float, rate: float) -> float:
        return work * share / rate * us_per_cycle

    # ptxas saves integer instructions: the sizes of both codes tell how many.
    issued, integer = float(count("warp_instructions")), float(count("integer"))
    if launch.get("sass_instructions") and launch.get("ptx_instructions"):
        others = issued - integer
        issued *= min(1, launch["sass_instructions"] / launch["ptx_instructions"])
        integer = max(issued - others, integer / 4)
    # L2 serves whatever bypasses L1 (cp.async, bulk copies and writes), and of the other loads at least each byte once.
    read, copied = count("global_sectors_read"), count("async_sectors_read")
    through_l2 = count("global_sectors_written") + min(read - copied, count("unique_bytes_read") // SECTOR)
    tcgen05 = count("tcgen05_flops")
    flops = count("mma_flops") - tcgen05
    # An mma.m16n8k32 of 8-bit numbers is 8192 flops per warp; what does more is wgmma.
    wgmma = gpu.wgmma_flops and flops > 8192 * max(1, count("mma"))
    # One data path of 128 bytes serves shared memory and L1. A load or store takes it at least once, a copy when it
    # arrives. Per 8192 flops, wgmma reads 128 bytes of its second operand; our kernels hold the first in registers.
    # What tcgen05.mma reads is counted; operands in tensor memory do not take this path.
    passes = max((read - copied + count("global_sectors_written")) / 4, count("load_global", "store_global"))
    passes += count("shared_wavefronts") + count("async_sectors_received") / 4 + (flops / 8192 if wgmma else 0)
    passes += count("tcgen05_wavefronts")
    tensor = on_multiprocessor(flops, gpu.wgmma_flops if wgmma else gpu.mma_flops)
    if tcgen05:
        if not gpu.tcgen05_flops:
            raise ValueError(f"{launch['kernel']} uses tcgen05, which {gpu.name} does not have")
        tensor += on_multiprocessor(tcgen05, gpu.tcgen05_flops)
    bounds = {
        "issue": on_multiprocessor(issued, gpu.issue),
        "integer": on_multiprocessor(integer, gpu.integer),
        "fp32": on_multiprocessor(count("fp32"), gpu.fp32),
        "half": on_multiprocessor(count("half"), gpu.half),
        "convert": on_multiprocessor(count("convert"), gpu.convert),
        "special": on_multiprocessor(count("special"), gpu.special),
        "shuffle": on_multiprocessor(count("shuffle"), gpu.exchange),
        "constant": on_multiprocessor(count("constant_wavefronts"), gpu.constant),
        "tensor": tensor,
        "shared+L1": on_multiprocessor(passes, 1),
        "L2 port": on_multiprocessor(SECTOR * (through_l2 + count("async_sectors_received")), gpu.l2_port),
        "L2": SECTOR * (through_l2 + copied) / gpu.l2 * 1e-3,
        "DRAM": count("unique_bytes_read", "unique_bytes_written") / gpu.dram * 1e-3,
    }
    # Little's law: bytes in flight over latency.
    loads = count("load_global", "async_copy")
    if loads and read:
        at_once = min(blocks, waves.used * min(waves.resident, waves.busiest)) * warps
        flying = at_once * min(LOADS_IN_FLIGHT, max(1.0, loads / (blocks * warps))) * SECTOR * read / loads
        bounds["latency"] = SECTOR * read / flying * gpu.dram_cycles * us_per_cycle
    return Estimate(bounds, waves)


def describe(launch: Launch, gpu: Gpu) -> str:
    result = estimate(launch, gpu)
    waves, longest = result.waves, result.bounds[result.limit]
    shown = sorted(((us, name) for name, us in result.bounds.items() if us >= 0.02 * longest), reverse=True)
    share = math.prod(launch["grid"]) / (waves.busiest * gpu.multiprocessors)
    return "\n".join(
        [
            launch["kernel"].split("(")[0],
            f"  {gpu.name}: at least {result.us:.1f} us = {longest:.2f} by {result.limit} + {FIXED_US:.0f} fixed",
            "    " + "  ".join(f"{name} {us:.2f}" for us, name in shown),
            f"    {waves.used} of {gpu.multiprocessors} SMs, {waves.resident} CTAs on each, {waves.clusters} clusters "
            f"at once, {waves.waves} wave{'s' * (waves.waves > 1)}; SMs are {100 * share:.0f}% as busy as the busiest",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="what cudasim --profile wrote")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--gpcs", help="the SMs of each GPC, separated by commas")
    arguments = parser.parse_args()
    gpu = GPUS[arguments.gpu]
    if arguments.gpcs:
        gpu = dataclasses.replace(gpu, gpcs=[int(sms) for sms in arguments.gpcs.split(",")])
    last = {launch["kernel"]: launch for launch in map(json.loads, arguments.profile.read_text().splitlines())}
    for launch in last.values():
        print(describe(launch, gpu))


if __name__ == "__main__":
    main()
