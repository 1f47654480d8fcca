"""Public names of a package whose modules are imported at the first access."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazily(
    package: str, defined_in: Mapping[str, str], public: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        defined_in: for each lazy name, the module that defines it, relative to the package. Submodules themselves have
            ``"."``.
        public: the package's ``__all__``.
    """

    def getattribute(name: str) -> Any:
        if name not in defined_in:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if defined_in[name] == ".":
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(defined_in[name], package), name)

    def names() -> list[str]:
        return sorted({*public, *(name for name in vars(sys.modules[package]) if name.startswith("__"))})

    return getattribute, names
