"""The build of the package: hardened binaries, and tools with tested versions."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

from qlora_ext import _C, _library

ROOT = pathlib.Path(__file__).parents[2]
BINARIES = [_C.__file__, *filter(None, (_library._find(f"libqlora_{part}") for part in ("kernels", "cpu", "cuda")))]


def readelf(*options: str) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    return subprocess.run(["readelf", "-W", *options], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: pathlib.Path(path).name)
def test_binaries_are_hardened(binary: str) -> None:
    segments = readelf("--segments", binary)
    assert "GNU_RELRO" in segments
    assert re.search(r"GNU_STACK .* RW ", segments)  # not executable
    assert re.search(r"FLAGS.*\bNOW\b|BIND_NOW", readelf("--dynamic", binary))  # full RELRO needs eager binding
    symbols = readelf("--dyn-syms", binary)
    if "__asan_init" in symbols:
        pytest.skip("a sanitized build, whose checks replace the stack protector")
    assert "__stack_chk_fail" in symbols


def exported(binary: str) -> set[str]:
    return set(
        re.findall(r"(?:FUNC|OBJECT) +(?:GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ (\S+)", readelf("--dyn-syms", binary))
    )


@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: pathlib.Path(path).name)
def test_libraries_export_only_their_own_symbols(binary: str) -> None:
    """If two libraries export the same standard template, the linker uses one for both, regardless of their flags."""
    allowed = {"_C": "PyInit__C", "libqlora_kernels": "_ZN5qlora.*", "libqlora_cpu": "aoti_torch_cpu_linear_nf4"}
    pattern = allowed.get(pathlib.Path(binary).name.split(".")[0], "$^")
    assert [symbol for symbol in sorted(exported(binary)) if not re.fullmatch(pattern, symbol)] == []


def test_the_kernels_are_there_once() -> None:
    kernels = _library._find("libqlora_kernels")
    assert kernels is not None
    for name in ("linear_nf4", "quantize_nf4", "current_isa"):
        mangled = f"_ZN5qlora3cpu{len(name)}{name}"
        assert any(symbol.startswith(mangled) for symbol in exported(kernels))
    for user in (_C.__file__, _library._find("libqlora_cpu")):
        dynamic = readelf("--dynamic", user)
        assert "[libqlora_kernels.so]" in dynamic
        assert "[$ORIGIN]" in dynamic
        assert pathlib.Path(user).stat().st_size < pathlib.Path(kernels).stat().st_size / 2


def test_the_bindings_need_no_torch() -> None:
    code = f"""
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
packed, absmax = module.quantize_nf4(np.linspace(-1, 1, 64, dtype=np.float32))
assert module.dequantize_nf4(packed, absmax, 64)[-1] == 1
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_thrown_by_the_runtime_that_catches_them() -> None:
    """With another runtime, an exception would never be counted as finished, or would end the process."""
    try:
        runtime = ctypes.CDLL("libstdc++.so.6")  # torch's runtime, which is loaded
    except OSError:
        pytest.skip("torch's C++ runtime is not GCC's")
    w = torch.zeros(64)
    for quantize in (torch.ops.qlora.quantize_nf4, lambda w, size: _C.quantize_nf4(w.numpy(), size)):
        for _ in range(3):
            with pytest.raises(ValueError, match="block_size"):
                quantize(w, 65)
        assert runtime._ZSt19uncaught_exceptionsv() == 0


def test_the_bindings_share_nothing_with_other_modules_of_pybind11() -> None:
    """With the same version they would translate our exceptions, and those in a wheel have their own C++ runtime."""
    names = re.findall(rb"__pybind11_internals_v\w+", pathlib.Path(_C.__file__).read_bytes())
    assert names
    assert [name for name in names if b"_qlora_ext" not in name] == []


def test_a_torch_of_another_cuda_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_library(path: str) -> None:
        raise OSError(f"Could not load {path}") from OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(_library, "_find", lambda name: f"{name}.so")
    expected = r"^libcudart.so.13: .*: expected a torch built for CUDA 13, .* version 580 or newer; .* CUDA 12.8$"
    assert re.match(expected, _library._load_cuda() or "")


# The patterns of requirements in each file: pip's arguments, and requirements of build, checks and formatting.
PLACES = {
    "pyproject.toml": r"^(?:requires|dev) = \[((?:.|\n)*?)\]$",
    "_build_backend/qlora_backend.py": r"return (\[\"torch.*?\])",
    ".ci/run": r"pip install (.*)",
    "scripts/environment.sh": r"pip install (.*)",
    "scripts/packaging/tools.sh": r"pip install (.*)",
    "scripts/packaging/tools.txt": r"^([\w-]+==\S+)",
    "scripts/test_wheels": r"pip install (.*)",
    "scripts/test": r"install_qlora_ext \w+ (.*)",
    "scripts/finetune": r"install_qlora_ext \w+ (.*)",
}


def requirements(path: str) -> list[str]:
    """The requirements in ``path``, quoted or not, without this project itself."""
    if not (ROOT / path).exists():
        pytest.skip(f"{path} is not in this tree")
    text = re.sub(r" +#.*", "", (ROOT / path).read_text())
    found: list[str] = []
    for place in re.findall(PLACES[path], text, re.MULTILINE):
        quoted = re.findall(r'"([^"]*)"', place)
        bare = [word for word in re.sub(r'"[^"]*"', "", place).split() if word[0].isalpha()]
        found += [
            r for r in quoted + bare if r[0].isalpha() and not set("$/") & set(r) and not r.startswith("qlora_ext[")
        ]
    return found


@pytest.mark.parametrize("path", PLACES)
def test_tools_of_build_and_checks_have_upper_bounds(path: str) -> None:
    found = requirements(path)
    assert found
    assert [r for r in found if not re.search(r"<|==", r)] == []


def test_tools_of_releases_are_pinned() -> None:
    """Actions are pinned by commit, because tags can be moved, and build tools by the hashes of their files."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    if not workflows:
        pytest.skip("the workflows are not in this tree")
    used = [line for path in workflows for line in re.findall(r"uses: *(.*)", path.read_text())]
    assert len(used) >= 8
    assert [line for line in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} +# v[\d.]+", line)] == []
    assert "--require-hashes" in (ROOT / "scripts/packaging/tools.sh").read_text()
    tools = (ROOT / "scripts/packaging/tools.txt").read_text()
    pinned = re.split(r"^(?=[\w-]+==)", tools, flags=re.MULTILINE)[1:]
    assert len(pinned) >= 10
    assert [tool for tool in pinned if not re.search(r"--hash=sha256:[0-9a-f]{64}", tool)] == []


def test_lint_versions_agree() -> None:
    pinned = {r for r in requirements("pyproject.toml") if "==" in r}
    assert pinned
    assert pinned <= set(requirements(".ci/run"))


def test_scripts_build_with_the_tools_of_the_package() -> None:
    names = r"scikit-build-core|pybind11|cmake|ninja"
    tools = {r for r in requirements("scripts/environment.sh") if re.match(names, r)}
    assert len(tools) == 4
    assert tools <= set(requirements("pyproject.toml"))


@pytest.mark.parametrize(
    ("cuda", "gpus", "options"),
    [
        ("13.0", [(8, 6), (9, 0), (8, 0)], "-DQLORA_CUDA=AUTO -DQLORA_CUDA_ARCHS=80-real;90-real"),
        ("13.0", [(7, 0), (7, 5)], "-DQLORA_CUDA=AUTO -DQLORA_CUDA_ARCHS=75-real"),
        ("13.0", [(7, 0)], "-DQLORA_CUDA=OFF"),
        ("13.0", [], "-DQLORA_CUDA=OFF"),
        (None, [(9, 0)], "-DQLORA_CUDA=OFF"),  # another maker's
    ],
)
def test_the_scripts_compile_for_these_gpus(
    cuda: str | None, gpus: list[tuple[int, int]], options: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "torch.py").write_text(f"""
class version: cuda = {cuda!r}
class cuda:
    is_available = lambda: {bool(gpus)}
    device_count = lambda: {len(gpus)}
    get_device_capability = {gpus}.__getitem__
""")
    run = subprocess.run(
        ["bash", "-c", f"source {shlex.quote(str(ROOT / 'scripts/environment.sh'))} && cuda_options"],
        env={**os.environ, "QLORA_VENV": sys.prefix, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (run.stdout.strip(), run.stderr) == (options, "")


# What /proc/cpuinfo calls the feature of each instruction set, the best first.
FEATURES = {
    "neon_i8mm": "i8mm",
    "neon_bf16": "bf16",
    "neon_dotprod": "asimddp",
    "neon": "asimd",
    "amx_bf16": "amx_bf16",
    "avx512_bf16": "avx512_bf16",
    "avx512": "avx512_vbmi",
    "avx_vnni": "avx_vnni",
    "avx2": "avx2",
}
BASES = {"avx_vnni": "avx2", "amx_bf16": "avx512_bf16", "neon_dotprod": "neon", "neon_i8mm": "neon_bf16"}


@pytest.mark.skipif(sys.platform != "linux", reason="features are read from /proc/cpuinfo")
@pytest.mark.parametrize("forced", [None, "scalar"])
def test_the_scripts_compile_for_this_processor(forced: str | None, tmp_path: pathlib.Path) -> None:
    tools = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    if not (shutil.which("cmake", path=tools) and shutil.which("ninja", path=tools)):
        pytest.skip("cmake or ninja is not installed")
    words = pathlib.Path("/proc/cpuinfo").read_text().split()
    best = forced or next(isa for isa, feature in FEATURES.items() if feature in words)
    run = subprocess.run(
        ["cmake", "-S", ROOT / "tests/kernels", "-B", tmp_path, "-G", "Ninja", "-DQLORA_CPU_ISAS=native"],
        env={**os.environ, "PATH": tools, "CMAKE_EXPORT_COMPILE_COMMANDS": "1", "QLORA_CPU_ISA": forced or ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    compiled, unoptimized = set(), set()
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        part = re.search(r"parts/(\w+)_few_tokens\.cpp$", entry["file"])
        if part:
            compiled.add(part[1])
            unoptimized |= {part[1]} if " -O1 " in entry["command"] else set()
    used = {best, BASES.get(best, best)}
    others = {"scalar", "neon" if platform.machine() == "aarch64" else "avx2"}
    assert compiled | {best} == used | others  # amx_bf16 has no file for few tokens
    assert unoptimized == others - used
