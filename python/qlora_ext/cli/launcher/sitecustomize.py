"""Run by every Python that ``qlora-ext run`` starts, and by those that these start: this folder is on PYTHONPATH.

``qlora_ext`` is imported just before transformers or PEFT is, for their sake alone: a Python that needs neither starts
as fast as ever, and may still choose what torch reads from the environment as it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType


class _BeforeTransformers(importlib.abc.MetaPathFinder):
    """Finds nothing; imports ``qlora_ext`` the first time that a library is looked for which it serves."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name not in ("transformers", "peft"):
            return
        sys.meta_path.remove(self)
        try:
            import qlora_ext as qlora_ext
        except ImportError as error:
            warnings.warn(f"qlora-ext run: {sys.executable} cannot import qlora_ext: {error}", stacklevel=2)


def _run_hidden() -> None:
    """Runs the ``sitecustomize`` that this one hides, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _BeforeTransformers())
_run_hidden()
