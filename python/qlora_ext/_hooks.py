"""Runs an integration once the library it serves is imported, so that ``import qlora_ext`` need import neither."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType


class _Watcher(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the loader of the watched modules: runs the real one, then imports what waits for the module."""

    def __init__(self) -> None:
        self.waiting: dict[str, str] = {}
        self._loaders: dict[str, importlib.abc.Loader] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting or fullname in self._loaders:
            return None
        self._loaders[fullname] = self  # marks the lookup below as ours, which must not come back here
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            del self._loaders[fullname]
        if spec is None or spec.loader is None:
            return None
        self._loaders[fullname] = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        loader = self._loaders.pop(spec.name)
        spec.loader = module.__loader__ = loader
        loader.exec_module(module)
        _integrate(spec.name, self.waiting.pop(spec.name))


def _integrate(module: str, integration: str) -> None:
    try:
        importlib.import_module(integration)
    except Exception as error:  # a version of the library that was never seen: the library itself must still import
        warnings.warn(f"qlora_ext: {module} could not be integrated: {error!r}", RuntimeWarning, stacklevel=2)


_WATCHER = _Watcher()


def after_import(module: str, integration: str) -> None:
    """Imports ``integration`` as soon as ``module`` has been imported: now, or whenever that happens."""
    if module in sys.modules:
        _integrate(module, integration)
        return
    _WATCHER.waiting[module] = integration
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
