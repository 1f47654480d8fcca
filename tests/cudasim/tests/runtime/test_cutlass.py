"""A second opinion on tcgen05: CUTLASS's tutorials, which compare their results with a reference.

They run if CUTLASS names a checkout of github.com/NVIDIA/cutlass. Each takes one to two minutes to compile.
"""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest
from simulator import simulate

if "CUTLASS" not in os.environ:
    pytest.skip("CUTLASS names no checkout of github.com/NVIDIA/cutlass", allow_module_level=True)
ROOT = pathlib.Path(os.environ["CUTLASS"])
TUTORIALS = ROOT / "examples" / "cute" / "tutorial" / "blackwell"


@pytest.mark.parametrize("name", sorted(path.stem for path in TUTORIALS.glob("*.cu")))
def test_tutorial(name: str, tmp_path: pathlib.Path) -> None:
    program = tmp_path / name
    driver = next(path for path in os.environ["LD_PRELOAD"].split(":") if path.endswith("/libcuda.so.1"))
    nvcc = ["nvcc", "-std=c++17", "-O1", "-arch=compute_100a", "-code=compute_100a", "--expt-relaxed-constexpr"]
    includes = [f"-I{ROOT / folder}" for folder in ("include", "tools/util/include", "examples/common")]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [*nvcc, *includes, "-cudart", "shared", TUTORIALS / f"{name}.cu", "-Xlinker", driver, "-o", program]
    subprocess.run(command, check=True, env=environment)
    # The first stores tiles to shared memory without a fence.proxy.async.
    checks = "init,grid" if name == "01_mma_sm100" else "race,init,grid"
    result = simulate(["--arch", "100", "--check", checks], [program, "512", "1024", "256"])
    assert "Execution is successful." in result.stdout, result.stderr
