"""The parts of a release: the source distribution, the wheels in dist/ if there are any, their metadata."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import re
import shutil
import sys
import tarfile
from typing import Any

import pytest

import qlora_ext
from qlora_ext import _library

ROOT = pathlib.Path(__file__).parents[2]
WHEELS = sorted((ROOT / "dist").glob("*manylinux*.whl"))


@pytest.fixture
def packaging(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of scripts/packaging, whose scripts are not in a package."""
    if not (ROOT / "scripts" / "packaging").is_dir():
        pytest.skip("scripts/ is not in this tree")
    monkeypatch.syspath_prepend(ROOT / "scripts" / "packaging")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return importlib.import_module


@pytest.mark.skipif(not WHEELS, reason="no wheels in dist/: scripts/wheels makes them")
@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_wheels_need_nothing_that_older_systems_lack(packaging: Any, wheel: pathlib.Path) -> None:
    check = packaging("check")
    names = {entry.filename.split(".")[0] for entry in check.libraries(wheel)}
    assert {"qlora_ext/_C", "qlora_ext/libqlora_kernels", "qlora_ext/libqlora_cpu"} <= names
    assert check.check_wheel(wheel) == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
@pytest.mark.parametrize("part", ["kernels", "cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_installed_libraries_find_all_that_they_need(packaging: Any, part: str) -> None:
    """By the rule for wheels. A library that was compiled here may also need GCC's libraries."""
    check, library = packaging("check"), pathlib.Path(_library._find(f"libqlora_{part}"))
    if "__asan_init" in check.unnamed(library):
        pytest.skip("a sanitized build needs the sanitizers' libraries")
    assert {*check.unmet(library)} <= {"needs libstdc++.so.6", "needs libgcc_s.so.1"}


def test_only_directories_of_a_build_are_emptied(packaging: Any, tmp_path: pathlib.Path) -> None:
    emptied = packaging("wheels").emptied
    (tmp_path / "work").mkdir()
    emptied(tmp_path / "work")
    (tmp_path / "work" / "built").touch()
    emptied(tmp_path / "work")
    assert not (tmp_path / "work" / "built").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="not empty, and no build of ours"):
        emptied(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_the_source_distribution_is_complete(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It contains every source and script of the tree, and no library that a developer has built in the tree."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(ROOT / "_build_backend")
    monkeypatch.chdir(ROOT)
    backend = importlib.import_module("qlora_backend")
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    folders = ("cpp", "cuda", "python", "scripts", "tests", "bench", "docs", "_build_backend")
    kinds = {".so", ".pyc"}
    tree = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in tree if path.suffix not in kinds} - names == set()
    assert {name for name in names if name.endswith(tuple(kinds))} == set()


def test_kernels_of_a_wheel_pass_the_checks(
    packaging: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spills fail the build for each architecture of the wheel, and bench/cuda_static.py checks the machine code."""
    wheels, commands = packaging("wheels"), list[str]()

    def run(*command: object, cwd: pathlib.Path | None = None) -> str:
        commands.append(" ".join(map(str, command)))
        return ""

    source = tmp_path / "source"
    monkeypatch.setattr(wheels, "run", run)
    monkeypatch.setattr(wheels.glibc, "make", lambda arch, folder: folder)
    monkeypatch.setattr(wheels, "make_sdist", lambda out, work: (tmp_path / "sdist", source))
    monkeypatch.setattr(wheels, "make_pure_wheel", lambda source, work: tmp_path / "pure")
    monkeypatch.setattr(wheels, "find_headers", lambda version: None)
    monkeypatch.setenv("QLORA_TORCH_ROOT", str(tmp_path))
    monkeypatch.setenv("QLORA_BENCH_RESULTS", "")
    parser = argparse.ArgumentParser()
    wheels.add_arguments(parser)
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    for options, checked in (["--cuda"], True), ([], False):
        commands.clear()
        wheels.make_all(parser.parse_args([*places, "--arch", os.uname().machine, *options]))
        configure = next(command for command in commands if command.startswith("cmake -S"))
        assert ("-DCMAKE_CUDA_FLAGS=-Xptxas=-Werror" in configure) is checked
        static = f"{sys.executable} {source / 'bench' / 'cuda_static.py'}"
        assert (static in commands) is checked  # without --arch: all of them
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "-Xptxas=-warn-spills" in cmake
    default = re.search(r'QLORA_CUDA_ARCHS "([^"]*)"', cmake)[1]
    built = tuple(int(number) for number in re.findall(r"(\d+)-real", default))
    monkeypatch.syspath_prepend(ROOT)
    assert built == importlib.import_module("bench.lib.cuda_steps").ARCHS
    nightly = re.findall(r"(\d+)-real", (ROOT / ".ci" / "run").read_text())
    assert sorted(map(int, nightly)) == sorted(built)


def test_files_agree_about_the_version(packaging: Any) -> None:
    stated = packaging("release").versions(ROOT)
    assert stated["pyproject.toml"] == qlora_ext.__version__
    assert stated["CHANGELOG.md"] in (None, stated["pyproject.toml"])


def test_notes_are_the_changelog_of_a_version(packaging: Any) -> None:
    changelog = (
        "# Changelog\n\n## [Unreleased]\n\n- C\n\n## [0.2.0] - 2026-01-01\n\n### Added\n\n- B\n\n## [0.1.0]\n\n- A\n"
    )
    notes = packaging("release").notes
    assert notes(changelog, "0.2.0") == "### Added\n\n- B\n"
    assert notes(changelog, "0.1.0") == "- A\n"
    assert notes(changelog, "0.3.0") == ""


def test_the_bill_of_materials_names_every_file_by_its_hash(packaging: Any, tmp_path: pathlib.Path) -> None:
    sbom = packaging("sbom")
    (tmp_path / "a.whl").write_bytes(b"abc")
    text = sbom.document("1.2.3", sbom.files([tmp_path / "a.whl"]))
    assert text == sbom.document("1.2.3", sbom.files([tmp_path / "a.whl"]))
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["metadata"]["component"]["version"]) == ("CycloneDX", "1.2.3")
    [file] = bill["components"]
    assert file["name"] == "a.whl"
    [digest] = file["hashes"]
    assert digest["content"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_headers_tell_the_version_they_are_of(packaging: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "patchlevel.h").write_text("#define PY_MAJOR_VERSION\t3\n#define PY_MINOR_VERSION\t14\n")
    assert packaging("wheels").version_of(tmp_path) == "3.14"
