"""The cudasim command: checks, profile, devices."""

import json
import os
import pathlib
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).parents[2]


def simulate(arguments, program, ops):
    library = next(str(path) for path in torch.ops.loaded_libraries if "cudasim_test" in str(path))
    environment = {
        k: v
        for k, v in os.environ.items()
        if (k != "LD_PRELOAD" and not k.startswith("CUDASIM_")) or k == "CUDASIM_BUILD"
    }
    prologue = f"import torch; torch.ops.load_library({library!r}); ops = torch.ops.cudasim_test\n"
    return subprocess.run(
        [ROOT / "cudasim", *arguments, sys.executable, "-c", prologue + program],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_profile(ops, tmp_path):
    out = tmp_path / "profile.jsonl"
    result = simulate(["--profile", out], "x = torch.ones(1000, device='cuda')\nfor _ in range(3): ops.add(x, x)", ops)
    assert result.returncode == 0, result.stderr
    launches = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(launches) == 3
    launch = launches[0]
    assert "add_kernel" in launch["kernel"]
    assert launch["grid"] == [8, 1, 1]
    assert launch["block"] == [128, 1, 1]
    assert launch["registers_exact"]
    assert launch["registers"] > 4
    assert launch["global_sectors_written"] == launch["global_sectors_written_ideal"] == 125
    assert launch["unique_bytes_read"] == 4000  # both arguments are the same tensor


def test_race_check(ops):
    program = "x = torch.ones(1000, device='cuda')\nprint(ops.sum(x, synchronized=False))"
    result = simulate(["--check", "race"], program, ops)
    assert result.returncode != 0
    assert "sum_kernel" in result.stderr
    assert "race" in result.stderr
    assert simulate(["--check", "race"], program.replace("False", "True"), ops).returncode == 0


def test_uninitialized_check(ops):
    result = simulate(["--check", "init"], "ops.uninitialized(torch.ones(1, device='cuda'))", ops)
    assert result.returncode != 0
    assert "uninitialized_kernel" in result.stderr


def test_races_between_blocks(ops):
    program = "print(ops.overlap(torch.ones(1, device='cuda'), {}).sum().item())"
    result = simulate(["--check", "grid"], program.format(1), ops)
    assert result.returncode != 0
    assert "overlap_kernel" in result.stderr
    assert ": race between blocks" in result.stderr
    result = simulate(["--check", "all"], program.format(0), ops)
    assert result.returncode != 0
    assert "same-value write race" in result.stderr
    result = simulate(["--check", "all,benign"], program.format(0), ops)
    assert result.stdout.strip() == "64.0"
    assert "same-value write race" in result.stderr
    assert simulate([], program.format(1), ops).returncode == 0


def test_endless_kernel_is_ended(ops):
    result = simulate(["--timeout", "2"], "ops.spin(torch.zeros(1, device='cuda'))", ops)
    assert result.returncode != 0
    assert "launch timed out" in result.stderr
    assert "spin_kernel" in result.stderr


def test_sticky_faults(ops):
    program = """
x = torch.ones(1000, device="cuda")
for call in (
    lambda: ops.add(x, x, checked=False),  # reaches beyond x
    lambda: ops.add(x, x),
    lambda: x + x,
    lambda: torch.empty(3, device="cuda"),
    lambda: x.cpu(),
    torch.cuda.synchronize,
    torch.cuda.Event(enable_timing=True).record,
):
    try:
        call()
        print("fine")
    except RuntimeError as error:
        print("illegal memory access" in str(error) and "add_kernel" in str(error))
"""
    for options, rest in (["--sticky"], "True"), ([], "fine"):
        result = simulate(options, program, ops)
        assert result.stdout.split() == ["True"] + [rest] * 6, result.stderr


def test_other_device(ops):
    result = simulate(
        ["--arch", "80"],
        "x = torch.ones(5, device='cuda')\nprint(torch.cuda.get_device_capability(), ops.add(x, x).sum().item())",
        ops,
    )
    assert result.stdout.strip() == "(8, 0) 10.0", result.stderr


def test_gpcs(ops):
    program = "print(torch.cuda.get_device_properties(0).multi_processor_count, *map(ops.active_clusters, (1, 4, 8)))"
    for gpcs, answer in (("18,18,16,16,16,16,16,16", "132 132 32 16"), ("4", "4 4 1 0")):
        result = simulate(["--gpcs", gpcs], program, ops)
        assert result.stdout.strip() == answer, result.stderr


def test_seeds_give_the_same_answer(ops):
    for seed in ("1", "2"):
        result = simulate(["--seed", seed], "print(ops.sum(torch.arange(1000.0).cuda()).item())", ops)
        assert result.stdout.strip() == "499500.0", result.stderr


def test_log(ops):
    result = simulate(["--log"], "ops.bounded(torch.ones(1, device='cuda'), 64)", ops)
    assert "launch" in result.stderr
    assert "bounded_kernel" in result.stderr
