"""Makes the wheels of a release on one Linux machine, for x86-64 and aarch64 and every supported Python.

Everything is made of the source distribution, which is made first. The libraries that know nothing of Python are
compiled once an architecture, `_C` once a Python from its headers alone; all are linked to an older glibc (glibc.py).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence

import check
import glibc
import sbom

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARCHITECTURES = ("x86_64", "aarch64")
_MARKER = ".qlora_wheels"  # in a directory that may be emptied
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def run(*command: object, cwd: pathlib.Path | None = None) -> str:
    """What ``command`` prints; its errors go where ours go."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, cwd=cwd)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{words[0]} has failed")
    return done.stdout


def find_headers(version: str) -> pathlib.Path | None:
    """The directory of that Python's Python.h: of an interpreter on PATH, of pyenv or of the manylinux images."""
    query = "import sysconfig; print(sysconfig.get_paths()['include'])"
    program = shutil.which(f"python{version}")
    if program:
        answer = subprocess.run([program, "-c", query], capture_output=True, text=True)
        if answer.returncode == 0 and (pathlib.Path(answer.stdout.strip()) / "Python.h").is_file():
            return pathlib.Path(answer.stdout.strip())
    tag = version.replace(".", "")
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    found = [
        *sorted(pyenv.glob(f"versions/{version}.*/include/python{version}")),
        *pathlib.Path("/opt/python").glob(f"cp{tag}-cp{tag}/include/python{version}"),
    ]
    return found[-1] if found else None


def stage_headers(headers: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of ``headers`` that serves both architectures.

    pyconfig.h says the same of both in all that extension modules ask it. Debian keeps it apart from the others, a
    directory an architecture.
    """
    shutil.copytree(headers, folder, dirs_exist_ok=True)
    debian = headers.parent / "x86_64-linux-gnu" / headers.name / "pyconfig.h"
    if debian.is_file():
        shutil.copy(debian, folder / "pyconfig.h")
    return folder


def version_of(headers: pathlib.Path) -> str:
    text = (headers / "patchlevel.h").read_text()
    return ".".join(re.findall(r"define PY_M(?:AJOR|INOR)_VERSION\s+(\d+)", text))


def compiler(arch: str) -> str:
    return "g++" if arch == os.uname().machine else f"{arch}-linux-gnu-g++"


def torch_root() -> pathlib.Path:
    return pathlib.Path(os.environ["QLORA_TORCH_ROOT"])


def make_sdist(out: pathlib.Path, work: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The source distribution, in ``out``, and the directory where it has been unpacked."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", work / "sdist", ROOT)
    [sdist] = (work / "sdist").glob("*.tar.gz")
    shutil.copy(sdist, out / sdist.name)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "source", filter="data")
    [source] = (work / "source").iterdir()
    return out / sdist.name, source


def make_pure_wheel(source: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """The wheel but for its libraries."""
    options = ("--no-deps", "--no-build-isolation", "-C", "wheel.cmake=false")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", work / "pure", source)
    [wheel] = (work / "pure").glob("*.whl")
    return wheel


def make_libraries(
    arch: str, source: pathlib.Path, headers: Sequence[pathlib.Path], work: pathlib.Path, cuda: bool
) -> pathlib.Path:
    """The directory with all libraries of an architecture."""
    build, install = work / arch / "build", work / arch / "install"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": install,
        "QLORA_CUDA": "ON" if cuda else "OFF",
        "QLORA_GLIBC": glibc.make(arch, work / arch / "glibc"),
        "QLORA_PYTHON_HEADERS": ";".join(map(str, headers)),
        "QLORA_TORCH_ROOT": torch_root(),
        "pybind11_DIR": run(sys.executable, "-m", "pybind11", "--cmakedir").strip(),
    }
    if arch != os.uname().machine:
        options |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": arch}
        options |= {"CMAKE_C_COMPILER": compiler(arch).replace("g++", "gcc"), "CMAKE_CXX_COMPILER": compiler(arch)}
    if cuda:  # a kernel that spills registers fails the build: CMakeLists.txt has ptxas warn of it
        options["CMAKE_CUDA_FLAGS"] = "-Xptxas=-Werror"
    settings = [f"-D{name}={value}" for name, value in options.items()]
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *settings)
    run("cmake", "--build", build)
    run("cmake", "--install", build, "--strip")
    return install / "qlora_ext"


def check_kernels(source: pathlib.Path, work: pathlib.Path) -> None:
    """Compiles the CUDA kernels for each architecture of the wheel, and stops if their machine code breaks a rule."""
    os.environ["QLORA_BENCH_RESULTS"] = str(work)  # no results of a build belong into the tree
    run(sys.executable, source / "bench" / "cuda_static.py")


def make_wheel(
    pure: pathlib.Path, libraries: pathlib.Path, arch: str, python: str, work: pathlib.Path, out: pathlib.Path
) -> pathlib.Path:
    """Puts the libraries of one Python into the pure wheel, and has auditwheel look at it."""
    tag = "cp" + python.replace(".", "")
    folder = work / arch / tag
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(pure) as archive:
        archive.extractall(folder)
    for library in sorted(libraries.iterdir()):
        other_python = library.name.startswith("_C.") and f".cpython-{tag[2:]}-" not in library.name
        if not other_python:
            shutil.copy(library, folder / "qlora_ext" / library.name)
    [info] = folder.glob("*.dist-info")
    version = info.name.split("-")[1]
    wheel = (info / "WHEEL").read_text()
    wheel = wheel.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    platform = f"manylinux_{glibc.VERSION.replace('.', '_')}_{arch}"
    (info / "WHEEL").write_text(re.sub(r"Tag: .*", f"Tag: {tag}-{tag}-{platform}", wheel))
    bill = sbom.document(version, sbom.compiled_in(compiler(arch), torch_root()))
    (info / "sboms").mkdir()
    (info / "sboms" / "qlora_ext.cdx.json").write_text(bill)
    packed = work / arch / "packed"
    packed.mkdir(exist_ok=True)
    run(sys.executable, "-m", "wheel", "pack", folder, "--dest-dir", packed)
    [made] = packed.glob(f"*-{tag}-{tag}-*.whl")
    # It knows the platforms of this machine's architecture alone by name; so it keeps the one that the wheel has.
    exclude = [f"--exclude={name}" for name in ("libtorch.so", "libcudart.so.*")]
    run(sys.executable, "-m", "auditwheel", "repair", "--no-update-tags", *exclude, "--wheel-dir", out, made)
    return out / made.name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    add("--python", nargs="+", default=PYTHONS, metavar="3.N", help="default: all that are supported")
    add("--headers", nargs="+", default=(), type=pathlib.Path, help="directories of Python.h, for Pythons not here")
    add("--cuda", action="store_true", help="with the CUDA kernels, for the architecture of this machine")
    add("--out", type=pathlib.Path, default=ROOT / "dist")
    add("--work", type=pathlib.Path, default=ROOT / "build" / "wheels", help="is emptied first, if a build made it")


def emptied(folder: pathlib.Path) -> None:
    """Makes ``folder`` an empty directory. Deletes its content only if an earlier build left it there."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARKER).is_file():
        sys.exit(f"--work {folder}: not empty, and no build of ours (it has no {_MARKER}); name another directory")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()


def make_all(arguments: argparse.Namespace) -> tuple[list[pathlib.Path], list[str]]:
    """The source distribution and the wheels that were made, and the Pythons that were skipped for want of headers."""
    out, work = arguments.out.resolve(), arguments.work.resolve()
    emptied(work)
    out.mkdir(parents=True, exist_ok=True)
    if "SOURCE_DATE_EPOCH" not in os.environ:  # every date in what is made: that of the last change
        os.environ["SOURCE_DATE_EPOCH"] = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    given = {version_of(headers): headers for headers in arguments.headers}
    headers = {version: given.get(version) or find_headers(version) for version in arguments.python}
    staged = [stage_headers(path, work / "headers" / version) for version, path in headers.items() if path]
    sdist, source = make_sdist(out, work)
    if arguments.cuda:
        check_kernels(source, work)
    pure = make_pure_wheel(source, work)
    wheels = []
    for arch in arguments.arch:
        cuda = arguments.cuda and arch == os.uname().machine
        libraries = make_libraries(arch, source, staged, work, cuda)
        wheels += [make_wheel(pure, libraries, arch, version_of(path), work, out) for path in staged]
    problems = [problem for wheel in wheels for problem in check.check_wheel(wheel)]
    if problems:
        sys.exit("\n".join(problems))
    return [sdist, *wheels], [version for version, path in headers.items() if not path]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/wheels", description=__doc__)
    add_arguments(parser)
    made, skipped = make_all(parser.parse_args())
    for path in made:
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.name}")
        for library in check.libraries(path) if path.suffix == ".whl" else []:
            print(f"{library.file_size / 1e6:15.2f} MB  {library.filename}")
    for version in skipped:
        print(f"skipped Python {version}: no headers of it here, see --headers")


if __name__ == "__main__":
    main()
