"""The operators' arguments by name, in the order of their schemas: no code in Python knows one by its number."""

from __future__ import annotations

import collections
from typing import Any

from torch._ops import OpOverload


def arguments_of(operator: OpOverload, defaults: bool = False) -> Any:
    """The named tuple of an operator's arguments, each None unless given.

    ``arguments_of(op)(*args).lora_a`` is what ``op(*args)`` takes for ``lora_a``; what a backward returns is one, too.

    Args:
        defaults: an argument that is not given is what the schema has by default. torch leaves these out.
    """
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]
    values = [a.default_value if defaults and a.has_default_value() else None for a in schema.arguments]
    return collections.namedtuple(schema.name.rpartition(":")[2], names, defaults=values)
