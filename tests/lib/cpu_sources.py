"""The CPU's instruction sets as cpp/cpu/sources.cmake has them: processors, compiler flags and parts."""

from __future__ import annotations

import pathlib
import platform
import re

ROOT = pathlib.Path(__file__).parents[2]
CPU = ROOT / "cpp/cpu"
_LISTS: dict[str, list[str]] = {
    name: words.split() for name, words in re.findall(r"^set\((\w+)(.*)\)$", (CPU / "sources.cmake").read_text(), re.M)
}


def _list(name: str) -> list[str]:
    """A list of sources.cmake, with the lists that it names."""
    found = []
    for word in _LISTS[name]:
        named = re.fullmatch(r"\$\{(\w+)\}", word)
        found += _list(named[1]) if named else [word]
    return found


# Processor, as Python and compilers call it -> the sets for it alone.
PROCESSORS = {"x86_64": _list("_isas_x86_64"), "aarch64": _list("_isas_aarch64")}
SETS = ["scalar", *(isa for sets in PROCESSORS.values() for isa in sets)]


def flags(isa: str) -> list[str]:
    """The set's compiler flags."""
    return _list(f"_{isa}")


def parts(isa: str) -> list[pathlib.Path]:
    """What is compiled for the set."""
    return [CPU / f"parts/{name}-inl.h" for name in _list(f"_parts_{isa}")]


def compiler(isa: str) -> str:
    """Of a processor that has the set."""
    processor = next((p for p, sets in PROCESSORS.items() if isa in sets), platform.machine())
    return "g++" if processor == platform.machine() else f"{processor}-linux-gnu-g++"
