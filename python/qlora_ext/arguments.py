"""The operators' arguments by name, in the order of their schemas: no code in Python knows one by its number."""

from __future__ import annotations

import collections
from typing import Any

from torch._ops import OpOverload


def arguments_of(operator: OpOverload) -> Any:
    """The named tuple of an operator's arguments, each None unless given.

    ``arguments_of(op)(*args).lora_a`` is what ``op(*args)`` takes for ``lora_a``; what a backward returns is one, too.
    """
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]
    return collections.namedtuple(schema.name.rpartition(":")[2], names, defaults=[None] * len(names))
