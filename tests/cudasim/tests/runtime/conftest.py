"""The simulator's own tests run where it imitates an H100, and are skipped elsewhere."""

from __future__ import annotations

import os
import pathlib
import subprocess
from typing import Any

import pytest
import torch

HERE = pathlib.Path(__file__).parent
CUDART = next((path for path in os.environ.get("LD_PRELOAD", "").split(":") if path.endswith("/libcudart.so.13")), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDART is None:
        reason = "not under the kernel simulator (tests/cudasim/cudasim)"
    elif os.environ.get("CUDASIM_ARCH", "90") != "90":
        reason = "the simulator imitates another device than an H100"
    else:
        reason = None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def ops() -> Any:
    """The test extension, compiled where its sources are newer."""
    assert CUDART is not None
    folder = pathlib.Path(CUDART).parent / f"tests-{torch.__version__}"
    library = folder / "libcudasim_test.so"
    sources = [HERE / name for name in ("ops.cu", "ops.cpp", "ops.h")]
    if not library.exists() or any(s.stat().st_mtime > library.stat().st_mtime for s in sources):
        folder.mkdir(exist_ok=True)
        build(folder, library)
    torch.ops.load_library(library)
    return torch.ops.cudasim_test


def build(folder: pathlib.Path, library: pathlib.Path) -> None:
    root, cuda = pathlib.Path(torch.__file__).parent, os.environ["CUDA_HOME"]
    nvcc = ["nvcc", "-std=c++17", "-O2", "-Xcompiler", "-fPIC"]
    for arch in ("80", "90"):
        nvcc += ["-gencode", f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]"]
    gxx = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{root}/include", f"-I{cuda}/include", f"-L{root}/lib"]
    libraries = ["-lc10", "-lc10_cuda", "-ltorch_cpu", CUDART]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # compilers need no simulator
    for command in (
        [*nvcc, "-c", HERE / "ops.cu", "-o", folder / "ops.o"],
        [*gxx, HERE / "ops.cpp", folder / "ops.o", "-o", library, *libraries],
    ):
        subprocess.run(command, check=True, env=environment)
