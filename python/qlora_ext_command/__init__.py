"""The entry point of the console command ``qlora-ext``.

This package is separate from ``qlora_ext``, because importing anything from ``qlora_ext`` runs its ``__init__``, which
imports torch and takes seconds. ``--help``, ``--version`` and the error for a misspelt option do not need torch.
"""

from __future__ import annotations

import importlib.util
import sys

_PACKAGE = "qlora_ext"


def main() -> int:
    """Runs the command; see ``qlora_ext.cli.main``.

    ``qlora_ext`` is registered without running its ``__init__``, so that the parsers can be imported from it. The
    ``__init__`` runs when a command needs it, with the effect of ``import qlora_ext``.
    """
    spec = None if _PACKAGE in sys.modules else importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.loader is None:
        from qlora_ext.cli import main as command

        return command()
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    loader = spec.loader

    from qlora_ext.cli import main as command

    return command(load_library=lambda: loader.exec_module(package))
