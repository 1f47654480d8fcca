"""The steps of `bench/run.py --device cuda`, with the reason of each that cannot run here. No torch here."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence

from . import nvidia_smi
from .steps import ROOT, Step

BENCH, TESTS = ROOT / "bench", ROOT / "tests" / "cuda"
SIMULATED = "CUDASIM_TORCH_LIBRARY" in os.environ
ARCHS = (75, 80, 90, 100, 110, 120)  # of the wheel's machine code: QLORA_CUDA_ARCHS in CMakeLists.txt
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS_PER_TEST = 120
MOST_WORKERS = 100  # of the tests, one after another: each that hangs or loses its context takes one with it

# A test of each kernel: few tokens, tiles, dX, LoRA's gradients, experts, the codec and its encoders.
SLICE = (
    "test_linear_cuda.py::test_dropout_in_every_tile",
    "test_linear_cuda.py::test_split_sums",
    "test_grouped_cuda.py::test_a_step_of_training_is_that_of_the_dense_layer",
    "test_codec_cuda.py::test_data_at_any_address",
    "test_encode_cuda.py::test_feedback",
)
# By compute capability: the architecture's name, and a test of the kernels that only it runs.
OWN_SLICE = {
    "9.0": ("Hopper", "test_linear_cuda.py::test_ranks_of_sm90"),
    "10.0": ("Blackwell", "test_linear_cuda.py::test_sm100"),
    "10.3": ("Blackwell", "test_linear_cuda.py::test_sm100"),
}


def pytest(*arguments: str, worker: bool = True) -> list[str]:
    """Each test is reported as soon as it has ended.

    A hanging kernel lets no signal through, so a thread ends the process of a test that takes too long. With `worker`,
    that is a worker of pytest-xdist, which is replaced, as is one whose context is lost (tests/lib/worker_faults.py).
    """
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly"]
    if worker:
        command += ["-n", "1", f"--max-worker-restart={MOST_WORKERS}", "-p", "tests.lib.worker_faults"]
    if not SIMULATED:  # where a test may take minutes
        command += [f"--timeout={SECONDS_PER_TEST}", "--timeout-method=thread"]
    return [*command, "-m", "cuda", *arguments]


def in_slice(names: Sequence[str]) -> list[str]:
    return [str(TESTS / name) for name in names]


def absent(*modules: str) -> str | None:
    """Why a step that needs these modules cannot run; None if it can."""
    names = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(names)}" if names else None


def arch() -> int:
    """The architecture of cuda_static.py whose code the card runs, or that of 9.0 without a card."""
    found = re.fullmatch(r"(\d+)\.(\d)", nvidia_smi.query("compute_cap"))
    capability = 10 * int(found[1]) + int(found[2]) if found else 90
    return max((a for a in ARCHS if a <= capability), default=min(ARCHS))


def steps(minutes: float, tiny: bool) -> list[Step]:
    """All steps but those of ncu and the sanitizers. A bench gets less time than the step, for imports and checks."""
    small = ["--tiny"] if tiny else []

    def bench(name: str, program: str, share: float, *arguments: str, missing: str | None = None) -> Step:
        command = [sys.executable, str(BENCH / f"{program}.py"), *arguments, *small]
        return Step(name, command, share, missing)

    def timed(name: str, program: str, share: float, *arguments: str, missing: str | None = None) -> Step:
        return bench(name, program, share, *arguments, "--minutes", f"{0.7 * share * minutes:.2f}", missing=missing)

    tests = [*in_slice(SLICE), "--quick"] if tiny else [str(ROOT / "tests"), f"--ignore={ROOT / 'tests' / 'cudasim'}"]
    nvcc = None if shutil.which("nvcc") else "nvcc is not on PATH (the CUDA toolkit has it)"
    models = absent("transformers", "peft")
    plugins = absent("pytest", "xdist", *([] if SIMULATED else ["pytest_timeout"]))
    found = [
        Step("compiled kernels", [sys.executable, str(BENCH / "cuda_static.py"), "--arch", str(arch())], 0.15, nvcc),
        bench("record of the card", "cuda_card", 0.05),
        bench("microbenchmarks", "cuda_micro", 0.05, missing=nvcc),
        Step("tests", pytest(*tests), 0.3, plugins),
        timed("operators and peers", "cuda_operators", 0.2),
        timed("crossover", "cuda_crossover", 0.1),
        timed("forced kernels", "cuda_sweep", 0.1),
        timed("training, Llama", "cuda_step", 0.08, "llama", missing=models),
        timed("training, experts", "cuda_step", 0.04, "experts", missing=models),
        timed("decoding", "cuda_decode", 0.04, missing=models),
    ]
    if SIMULATED:
        shapes = ["--shapes", "256x512", "--attempt", "10"] if tiny else []  # one attempt at placing their table
        found.append(Step("work counters", [sys.executable, str(BENCH / "cuda_counters.py"), *shapes]))
    return found


def counters(minutes: float, tiny: bool) -> list[Step]:
    """Nsight Compute, which stops before its time is over."""
    missing = None if shutil.which("ncu") else "ncu is not on PATH (Nsight Compute has it)"
    missing = "ncu counts on a card only" if SIMULATED else missing
    limit = ["--minutes", f"{0.8 * minutes:.2f}", *(["--tiny"] if tiny else [])]
    return [Step("ncu", [sys.executable, str(BENCH / "cuda_ncu.py"), *limit], 1.0, missing)]


def sanitizers() -> list[Step]:
    """On Hopper and Blackwell, 64 tokens run kernels of their own, so those cases are left to steps that may fail."""
    own = OWN_SLICE.get(nvidia_smi.query("compute_cap"))
    program = shutil.which("compute-sanitizer")
    missing = None if program else "compute-sanitizer is not on PATH (the CUDA toolkit has it)"
    missing = "compute-sanitizer checks a card only; the simulator has --check" if SIMULATED else missing

    modules = absent("pytest", "pytest_timeout")

    def step(tool: str, title: str, may_fail: bool, *tests: str) -> Step:
        command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command += pytest(*tests, worker=False)  # the tool's exit status is that of the process that it starts
        return Step(f"compute-sanitizer {tool}{title}", command, 1.0, missing or modules, may_fail)

    others = [*in_slice(SLICE), *(["-k", "not 64"] if own else [])]
    found = [step(tool, "", False, *others) for tool in SANITIZERS]
    if own:
        name, test = own
        found += [step(tool, f", {name}'s kernels", True, *in_slice([test])) for tool in SANITIZERS]
    return found
