"""The version of the package, read from the compiled module."""

from __future__ import annotations

from . import _C

VERSION: str = _C.build_info()["version"]
