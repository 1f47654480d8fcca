"""The version of the package, which the compiled module holds."""

from __future__ import annotations

from .. import _C

VERSION: str = _C.build_info()["version"]
