"""The entry point of the console command ``qlora-ext``."""

from __future__ import annotations

import importlib.util
import sys

_LIBRARY = "qlora_ext"


def main() -> int:
    """Runs the command; see ``qlora_app.main``.

    Importing anything from ``qlora_ext`` runs its ``__init__``, which imports torch and takes seconds. ``--help``,
    ``--version`` and the error for a misspelt option do not need torch. So ``qlora_ext`` is registered without running
    its ``__init__``, and the parsers can import its modules that do not need torch. The ``__init__`` runs when a
    command needs it, with the effect of ``import qlora_ext``.
    """
    spec = None if _LIBRARY in sys.modules else importlib.util.find_spec(_LIBRARY)
    if spec is None or spec.loader is None:
        from .main import main as command

        return command()
    package = importlib.util.module_from_spec(spec)
    sys.modules[_LIBRARY] = package
    loader = spec.loader

    from .main import main as command

    return command(load_library=lambda: loader.exec_module(package))


if __name__ == "__main__":
    sys.exit(main())
