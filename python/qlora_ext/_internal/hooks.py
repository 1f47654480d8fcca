"""Imports an integration when the library it serves is imported, so that ``import qlora_ext`` imports neither."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _Loader(importlib.abc.Loader):
    """A proxy of ``loader`` that imports the pending integrations after it has run the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        integrations = _WATCHER.waiting.pop(spec.name, ())
        if not _WATCHER.waiting:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _WATCHER]
        for integration in integrations:
            import_integration(spec.name, integration)


class _Watcher(importlib.abc.MetaPathFinder):
    """A finder that asks the other finders, and wraps the loaders of modules for which integrations are pending.

    It is in ``sys.meta_path`` only while it waits for a module.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, list[str]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


def import_integration(module: str, integration: str) -> None:
    """Imports ``integration`` for a library's ``module``, and warns if it fails."""
    try:
        importlib.import_module(integration)
    except Exception as error:  # an unknown version of the library, which must still import
        warnings.warn(f"qlora_ext: {module} could not be integrated: {error!r}", RuntimeWarning, stacklevel=2)


_WATCHER = _Watcher()


def after_import(module: str, integration: str) -> None:
    """Imports ``integration`` once ``module`` has been imported: now if it already has, else later."""
    if module in sys.modules:
        import_integration(module, integration)
        return
    _WATCHER.waiting.setdefault(module, []).append(integration)
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
