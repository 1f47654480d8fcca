"""What must hold of the libraries in a wheel, read with binutils' readelf, which reads every architecture's."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import glibc

MAX_EXTENSION = 1 << 20  # bytes: _C does not hold the kernels
KERNELS = r"libqlora_kernels\.so"
# What any library may ask the system for; and what each one of ours besides.
SYSTEM = r"lib(c|m|pthread|dl)\.so\.\d|ld-linux-.*"
NEEDS = {
    "_C": KERNELS,
    "libqlora_kernels": "",
    "libqlora_cpu": rf"{KERNELS}|libtorch\.so",
    "libqlora_cuda": rf"{KERNELS}|libtorch\.so|libcudart\.so\.\d+",
}
# Symbols without a version, which do not name the library that they come from. libtorch.so brings its own libraries,
# and with them the C++ runtime that throws exceptions (CMakeLists.txt) and, if it is built for CUDA, cuBLAS.
_TORCH = r"(aoti_)?torch_\w+|__cxa_\w+|__gxx_personality_v0|_Unwind_\w+|_ZSt\w+|_ZNSt15__exception_ptr\w+"
BROUGHT = {
    "_C": r"_?Py\w+",
    "libqlora_kernels": "",
    "libqlora_cpu": _TORCH,
    "libqlora_cuda": rf"{_TORCH}|cublas\w+",
}


def readelf(*arguments: str | pathlib.Path) -> str:
    return subprocess.run(["readelf", "-W", *arguments], capture_output=True, text=True, check=True).stdout


def libraries(wheel: pathlib.Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(wheel) as archive:
        return [entry for entry in archive.infolist() if entry.filename.endswith(".so")]


def needed(library: pathlib.Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", library))


def newest_glibc(library: pathlib.Path) -> tuple[int, ...]:
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", readelf("--version-info", library))
    return max((int(major), int(minor)) for major, minor in versions)


def symbols(library: pathlib.Path) -> list[tuple[str, str]]:
    """The section and the name of each dynamic symbol; UND is the section of those that it needs. Without weak ones."""
    return re.findall(r" GLOBAL +DEFAULT +(\S+) (\S+)", readelf("--dyn-syms", library))


def unnamed(library: pathlib.Path) -> list[str]:
    """The symbols without a version that it needs, and that no library beside it exports."""
    beside = [library.with_name(name) for name in needed(library)]
    exported = {name for path in beside if path.is_file() for section, name in symbols(path) if section != "UND"}
    wanted = {name for section, name in symbols(library) if section == "UND" and "@" not in name}
    return sorted(wanted - exported)


def unmet(library: pathlib.Path) -> list[str]:
    """The libraries and symbols that it needs, but will not find where the wheel is installed."""
    kind = library.name.split(".")[0]
    found = [f"needs {name}" for name in needed(library) if not re.fullmatch(f"{SYSTEM}|{NEEDS[kind]}", name)]
    missing = [symbol for symbol in unnamed(library) if not re.fullmatch(BROUGHT[kind], symbol)]
    return [*found, *(f"needs {symbol}, which no library exports" for symbol in missing)]


def problems(library: pathlib.Path) -> list[str]:
    """Why that library is not fit for a wheel."""
    found = []
    newest = newest_glibc(library)
    if newest > tuple(map(int, glibc.VERSION.split("."))):
        found.append(f"needs glibc {'.'.join(map(str, newest))}")
    found += unmet(library)
    wanted = needed(library)
    if any(re.fullmatch(KERNELS, name) for name in wanted) and "[$ORIGIN]" not in readelf("--dynamic", library):
        found.append("does not look for the kernels beside itself")
    if "libtorch.so" in wanted and "_Unwind_Resume" not in unnamed(library):
        found.append("has an unwinder of its own, whose exceptions would not reach torch")
    if library.name.startswith("_C.") and library.stat().st_size > MAX_EXTENSION:
        found.append(f"has {library.stat().st_size} bytes: the kernels once more?")
    return found


def check_wheel(wheel: pathlib.Path) -> list[str]:
    """What is wrong with the libraries of ``wheel``."""
    found = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        paths = [pathlib.Path(archive.extract(entry, folder)) for entry in libraries(wheel)]
        for path in paths:  # only now, because a library is checked with those beside it
            found += [f"{wheel.name}: {path.name} {problem}" for problem in problems(path)]
    return found


if __name__ == "__main__":
    sys.exit("\n".join(line for argument in sys.argv[1:] for line in check_wheel(pathlib.Path(argument))) or None)
