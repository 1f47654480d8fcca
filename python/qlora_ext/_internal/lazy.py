"""Names that a package offers without importing what defines them until somebody asks for one."""

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
        defined_in: of each name that is imported when it is asked for, the module that defines it, relative to the
            package. A module itself is defined in ``"."``.
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
