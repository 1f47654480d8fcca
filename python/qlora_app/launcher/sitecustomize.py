"""Runs in every Python process below ``qlora-ext run``, because this folder is on PYTHONPATH.

It imports ``qlora_ext`` just before transformers, diffusers or PEFT is imported. Processes without these libraries
start as fast as before, and can still set environment variables that torch reads at import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def _import_ours() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _BeforeTransformers)]
    try:
        import qlora_ext as qlora_ext
    except Exception as error:  # the program itself must still run
        if sys.stderr is not None:
            print(f"qlora-ext run: {sys.executable} cannot import qlora_ext: {error}", file=sys.stderr)


class _BeforeTransformers(importlib.abc.MetaPathFinder):
    """A finder that asks the other finders, and imports ``qlora_ext`` with the first library that it integrates."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ("transformers", "diffusers", "peft"):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((s for finder in others if (s := finder.find_spec(name, path, target)) is not None), None)
        loader: Any = None if spec is None else spec.loader
        if hasattr(loader, "exec_module"):
            create = loader.create_module

            def create_after_ours(spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
                vars(loader).pop("create_module", None)
                _import_ours()
                module: ModuleType | None = create(spec)
                return module

            loader.create_module = create_after_ours  # called by an import, and not by a search for the library
        return spec


def _run_hidden() -> None:
    """Runs the ``sitecustomize`` that this one shadows, if there is one, and gives it the module name."""
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _BeforeTransformers())
_run_hidden()
