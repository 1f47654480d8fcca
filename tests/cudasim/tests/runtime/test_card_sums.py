"""CUDASIM_MMA=card: sums of tensor cores, against numpy (card_sums.py), on each simulated card."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from card_sums import BF16, KINDS, card_sum, toward_zero
from simulator import simulate


def run_kinds(mma: str, arch: int, kinds: list[str]) -> subprocess.CompletedProcess[str]:
    return simulate(["--mma", mma, "--arch", str(arch)], ["card_sums.py", *kinds])


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_random_tiles(arch: int) -> None:
    kinds = [name for name, kind in KINDS.items() if arch == 90 or not kind.wgmma]
    kinds = {75: ["f16 k8"], 80: [k for k in kinds if k != "e4m3"]}.get(arch, kinds)
    result = run_kinds("card", arch, kinds)
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == kinds, result.stderr
    assert all(": 0 elements differ" in line for line in lines), result.stdout
    # The tiles tell this arithmetic from a sum that is rounded to nearest once, except where the result has few bits.
    assert all(int(line.split(", ")[1].split()[0]) > 100 for line in lines if "to f16" not in line), result.stdout


def test_ordered_sums_differ() -> None:
    result = run_kinds("ordered", 90, ["bf16", "wgmma bf16"])
    assert result.stdout.count("\n") == 2, result.stderr
    assert " 0 elements differ" not in result.stdout


def test_unknown_arithmetic_is_rejected() -> None:
    result = run_kinds("precise", 90, ["bf16"])
    assert result.returncode != 0
    assert "CUDASIM_MMA=precise is unknown: expected ordered (the default) or card" in result.stderr


def test_what_a_card_drops() -> None:
    """Terms below the last bit that takes part vanish, one by one, however many there are."""
    kind = KINDS["bf16"]
    a, b, c = np.zeros((16, 16)), np.ones((16, 8)), np.zeros((16, 8), np.float32)
    a[:, 0], a[:, 1:] = 1, 2.0**-26
    assert kind.element is BF16
    for arch in (80, 90):
        assert (card_sum(arch, kind, a, b, c) == 1).all()
    a[:, 1:] = -(2.0**-25)  # 9.0 keeps this bit, and 8.0 does not in the half that has the 1
    assert (card_sum(90, kind, a, b, c) == toward_zero(np.float64(1 - 15 * 2.0**-25), 23)).all()
    assert (card_sum(80, kind, a, b, c) == 1).all()
