"""The time model, on counters that are written down here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[2] / "model.py"
SPEC = importlib.util.spec_from_file_location("cudasim_model", PROGRAM)
assert SPEC
assert SPEC.loader
model = importlib.util.module_from_spec(SPEC)
sys.modules["cudasim_model"] = model  # dataclasses looks its module up
SPEC.loader.exec_module(model)

H100, B200 = model.GPUS["h100"], model.GPUS["b200"]
OTHER_H100 = dataclasses.replace(H100, gpcs=(18, 18, 16, 16, 16, 16, 16, 16))


def launch(**counters):
    return {
        "kernel": "k(int)",
        "grid": [132, 1, 1],
        "block": [128, 1, 1],
        "cluster": [1, 1, 1],
        "registers": 168,
        "static_shared_bytes": 0,
        "dynamic_shared_bytes": 200 << 10,
        **counters,
    }


def test_copies_bypass_l1():
    """A kernel of bulk copies with a few small loads, as our Hopper kernels are."""
    mb = (1 << 20) // 32
    counters = {"unique_bytes_read": 10 << 20, "load_global": 10_000, "async_copy": 100}
    loads = launch(global_sectors_read=90 * mb, **counters)
    copies = {**loads, "async_sectors_read": 80 * mb, "async_sectors_received": 160 * mb}
    of_loads, of_copies = model.estimate(loads, H100).bounds, model.estimate(copies, H100).bounds
    assert of_loads["L2"] == pytest.approx((10 << 20) / H100.l2 * 1e-3)  # L1 may serve the rest
    assert of_copies["L2"] == pytest.approx((90 << 20) / H100.l2 * 1e-3)
    # A multicast copy arrives at two SMs. The rest are loads, of distinct bytes.
    assert of_copies["L2 port"] == pytest.approx((170 << 20) / 132 / 64 / H100.ghz * 1e-3)


@pytest.mark.parametrize(
    ("size", "clusters", "gpu", "waves"),
    [(4, 32, H100, 2), (4, 32, OTHER_H100, 1), (4, 31, H100, 1), (8, 16, H100, 2), (8, 15, H100, 1), (1, 132, H100, 1)],
)
def test_waves_are_of_clusters(size, clusters, gpu, waves):
    case = launch(grid=[size * clusters, 1, 1], cluster=[size, 1, 1], integer=1_000_000)
    filled = model.waves_of(case, gpu)
    assert filled.waves == filled.busiest == waves
    one = launch(grid=[size * clusters, 1, 1], integer=1_000_000)
    assert model.estimate(case, gpu).bounds["integer"] == waves * model.estimate(one, gpu).bounds["integer"]


def test_the_busiest_cluster_takes_longest():
    """64 tiles on 31 clusters that stay resident: two of them take three tiles each."""
    case = launch(grid=[124, 1, 1], cluster=[4, 1, 1], warp_instructions=64 * 4000, integer=64 * 400)
    even = model.estimate(case, H100).bounds["integer"]
    uneven = model.estimate({**case, "busiest_cluster_instructions": 3 * 4000}, H100).bounds["integer"]
    assert uneven == pytest.approx(even * 3 * 31 / 64)


def test_shared_memory_serves_wgmma_and_copies():
    """A stage of the forward on Hopper for 128 tokens x 128 k: 32 KB arrive by multicast, of which this CTA's partner
    asked for half, and wgmma reads them twice."""
    counters = {"global_sectors_read": 512, "async_sectors_read": 512, "async_sectors_received": 1024, "async_copy": 1}
    stage = launch(grid=[1, 1, 1], mma=64, mma_flops=2 * 128**3, **counters)
    cycles = model.estimate(stage, H100).bounds["shared+L1"] * 1e3 * H100.ghz
    assert cycles == pytest.approx(256 + 2 * 256)
    by_mma = model.estimate({**stage, "mma": 2048}, H100).bounds["shared+L1"] * 1e3 * H100.ghz
    assert by_mma == pytest.approx(256)  # loads of shared memory, which are counted apart


def test_tcgen05_takes_128_cycles_for_128x256x16():
    """B and, unless it is in tensor memory, A are read from shared memory, 128 bytes per cycle."""
    flops = 100 * 2 * 128 * 256 * 16
    case = launch(grid=[1, 1, 1], mma=100, mma_flops=flops, tcgen05_flops=flops, tcgen05_wavefronts=100 * (64 + 32))
    cycles = {k: v * 1e3 * B200.ghz for k, v in model.estimate(case, B200).bounds.items()}
    assert cycles["tensor"] == pytest.approx(100 * 128)
    assert cycles["shared+L1"] == pytest.approx(100 * 96)
    with pytest.raises(ValueError, match="uses tcgen05, which H100 SXM does not have"):
        model.estimate(case, H100)


def test_cluster_that_fits_no_gpc():
    with pytest.raises(ValueError, match="no GPC of H100 SXM has room for a cluster of 32"):
        model.waves_of(launch(cluster=[32, 1, 1]), H100)


def test_constants_of_different_addresses():
    """Every thread of 132 CTAs of 128 threads reads 32 constants of its own: 4.7 us per SM at one address per clock."""
    reads = 132 * 4 * 32 * 64
    estimate = model.estimate(launch(load_const=reads // 32, constant_wavefronts=reads), H100)
    assert estimate.limit == "constant"
    assert estimate.us - model.FIXED_US == pytest.approx(8192 / 1755)


def test_command(tmp_path):
    profile = tmp_path / "launches.jsonl"
    profile.write_text(json.dumps(launch(grid=[128, 1, 1], cluster=[4, 1, 1], unique_bytes_read=1 << 20)) + "\n")
    command = [sys.executable, str(PROGRAM), str(profile)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "31 clusters at once, 2 waves" in result.stdout
    result = subprocess.run([*command, "--gpcs", "18,18,16,16,16,16,16,16"], capture_output=True, text=True, check=True)
    assert "32 clusters at once, 1 wave;" in result.stdout
