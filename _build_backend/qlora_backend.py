"""scikit-build-core, asking for torch at build time only where the target environment has none: its headers will do.

A static requirement would install torch a second time, into the build environment of every `pip install .`.
"""

import os
import pathlib
import shutil
import sysconfig

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403


def _torch() -> list[str]:
    if os.environ.get("QLORA_TORCH_ROOT"):
        return []
    for key in ("purelib", "platlib"):
        root = pathlib.Path(sysconfig.get_paths()[key]) / "torch"
        if (root / "version.py").is_file():
            return []  # CMakeLists.txt checks its version
    return ["torch>=2.11,<3"]


def _require_compiler() -> None:
    """One sentence instead of a page of CMake's."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise SystemExit(f"qlora_ext: no C++ compiler found (tried {', '.join(names)}): apt-get install g++")


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _require_compiler()
    return _build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _require_compiler()
    return _build.build_editable(wheel_directory, config_settings, metadata_directory)


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_torch()]
