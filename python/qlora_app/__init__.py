"""The application around ``qlora_ext``: the command ``qlora-ext``, and its commands as Python functions.

Example:
    >>> from qlora_app import export, finetune, plan
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import decoding, evaluation, planning
    from .commands.plan import plan
    from .evaluation.evaluating import evaluate
    from .exporting.export import export
    from .training.finetuning import finetune

__all__ = ["decoding", "evaluate", "evaluation", "export", "finetune", "plan", "planning"]

# Imported at the first access, because the parsers of the command need neither torch nor any other library.
_FUNCTIONS = {
    "evaluate": ".evaluation.evaluating",
    "export": ".exporting.export",
    "finetune": ".training.finetuning",
    "plan": ".commands.plan",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
