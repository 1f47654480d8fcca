"""Every fragment of cpp/cpu (a file that is compiled once per instruction set) compiles alone."""

from __future__ import annotations

import functools
import pathlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from cpu_sources import CPU, ROOT, SETS, compiler, flags, parts


def includes(path: pathlib.Path, isa: str) -> list[pathlib.Path]:
    """The headers of the package that a file includes when it is compiled for `isa`."""
    text = path.read_text()
    names = re.findall(r'^#include "(cpp/[^"]+)"', text, re.M)
    names += [f"cpp/cpu/isa/{isa}/{name}" for name in re.findall(r"^#include QLORA_ISA_HEADER\((.+)\)", text, re.M)]
    return [ROOT / name for name in names]


@functools.cache
def fragments(isa: str) -> list[pathlib.Path]:
    """The parts of the set, and the files in cpp/cpu that they include, directly or indirectly."""
    found = set(parts(isa))
    waiting = parts(isa)
    while waiting:
        new = [p for p in includes(waiting.pop(), isa) if p not in found and p.is_relative_to(CPU)]
        found.update(new)
        waiting += new
    return sorted(found)


def compile_alone(path: pathlib.Path, isa: str) -> str:
    """The compiler's messages for the fragment as a separate translation unit."""
    command = [compiler(isa), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused-function"]
    command += [f"-I{ROOT}", f"-DQLORA_ISA={isa}", *flags(isa), "-include", str(path), "-x", "c++", "/dev/null"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else f"{path.relative_to(ROOT)} for {isa}:\n{run.stderr[:2000]}"


def test_every_fragment_is_compiled_for_some_set() -> None:
    used = {p for isa in SETS for p in fragments(isa)}
    assert [p.relative_to(ROOT) for p in CPU.rglob("*-inl.h") if p not in used] == []


@functools.cache
def turns() -> dict[pathlib.Path, set[str]]:
    """The sets for which each fragment is compiled alone: scalar, and one of its other sets, in turn.

    Only sets for which a compiler is installed.
    """
    users = {
        path: [isa for isa in SETS if path in fragments(isa)] for path in sorted(set().union(*map(fragments, SETS)))
    }
    found = {}
    for i, (path, sets) in enumerate(users.items()):
        others = [isa for isa in sets if isa != "scalar" and shutil.which(compiler(isa))]
        found[path] = {isa for isa in sets if isa == "scalar"} | {others[i % len(others)] for _ in others[:1]}
    return found


@pytest.mark.parametrize("isa", [i if i == "scalar" else pytest.param(i, marks=pytest.mark.slow) for i in SETS])
def test_every_fragment_compiles_alone(isa: str) -> None:
    if shutil.which(compiler(isa)) is None:
        pytest.skip(f"there is no {compiler(isa)}")
    assert len(fragments(isa)) > 20
    paths = [path for path in fragments(isa) if isa in turns()[path]]
    assert paths
    with ThreadPoolExecutor(2) as pool:
        failures = [text for text in pool.map(lambda path: compile_alone(path, isa), paths) if text]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("isa", ["avx_vnni", "neon_i8mm"])
def test_the_loops_that_the_bench_counts_compile(isa: str) -> None:
    if shutil.which(compiler(isa)) is None:
        pytest.skip(f"there is no {compiler(isa)}")
    assert compile_alone(ROOT / "bench/cpu_loops.cpp", isa) == ""
