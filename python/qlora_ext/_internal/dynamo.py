"""The decorators of ``torch.compiler`` without the import of Dynamo, which takes seconds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable(function)``."""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets
    return call


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.assume_constant_result(function)``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
