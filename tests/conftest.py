"""Shared fixtures. Tests marked `cuda` need a GPU or the kernel simulator, tests marked `campaign` run under
scripts/attack, and files that import an optional library need it; otherwise they are skipped with the reason."""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Iterable, Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reads the hub; huggingface_hub reads this when it is imported

import torch

import qlora_ext
from commands import finished_run, paths, refused
from qlora_ext import dtypes
from quick import quick
from worker_faults import pytest_handlecrashitem, pytest_runtest_logreport

# Fixtures, and the hooks of a plugin.
__all__ = ["finished_run", "paths", "pytest_handlecrashitem", "pytest_runtest_logreport", "refused"]

# Set before the first call, so that every call reads it (test_kernels_cpu.py changes it from kernel to kernel).
os.environ.setdefault("QLORA_CPU_KERNEL", "")
os.environ.setdefault("QLORA_CUDA_KERNEL", "")
os.environ.setdefault("QLORA_CUDA_START", "")


# What no test needs to have but those that import it.
OPTIONAL = {"accelerate", "bitsandbytes", "compressed_tensors", "datasets", "diffusers", "gguf", "peft", "safetensors"}
OPTIONAL |= {"tokenizers", "transformers", "trl", "yaml"}


class Module(pytest.Module):
    """A file of tests, which is skipped if it imports an optional library that is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            library = (getattr(error.__cause__, "name", None) or "").partition(".")[0]
            if isinstance(error.__cause__, ModuleNotFoundError) and library in OPTIONAL:
                pytest.skip(f"{library} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: pathlib.Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = Module.from_parent(parent, path=module_path)
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests: every N-th")
    parser.addoption("--quick", action="store_true", help="run each test once, unless it takes long: lib/quick.py")


@pytest.hookimpl(trylast=True)  # among what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = (int(number) for number in config.getoption("part").split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--part: expected I/N with I from 1 to N, got {part}/{parts}")
    if config.getoption("quick"):
        items[:] = quick(items)
    items[:] = items[part - 1 :: parts]
    if "QLORA_ATTACK" not in os.environ:
        for item in items:
            if item.get_closest_marker("campaign"):
                item.add_marker(pytest.mark.skip(reason="takes minutes to hours; run by scripts/attack"))
    info = qlora_ext.build_info()
    if info["cuda_available"]:
        return
    reason = f"no CUDA: {info['cuda_error'] or 'torch finds no device'}"
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Skips the rest of a test that computes in bfloat16 on a GPU which cannot, and only there."""
    try:
        return (yield)
    except ValueError as error:
        if str(error).startswith("bfloat16 needs compute capability 8.0") and torch.cuda.is_available():
            pytest.skip(str(error))
        raise


def pytest_collection_finish() -> None:
    """What is imported and collected stays, so that the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack trace for each device that is not in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def native_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 model computes in bfloat16, also on a processor where the automatic compute dtype is float32."""
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda: True)
