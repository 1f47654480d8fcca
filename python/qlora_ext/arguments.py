"""The operators' arguments by name, read from their schemas, so that Python code never indexes them by position."""

from __future__ import annotations

import collections
from typing import Any

from torch._ops import OpOverload


def arguments_of(operator: OpOverload, defaults: bool = False) -> Any:
    """The named tuple type of an operator's arguments. A backward returns its gradients as such a tuple.

    ``arguments_of(op)(*args).lora_a`` is the value that ``op(*args)`` gets for ``lora_a``.

    Args:
        defaults: an omitted argument takes the schema's default instead of None. torch omits trailing arguments that
            equal their default.
    """
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]
    values = [a.default_value if defaults and a.has_default_value() else None for a in schema.arguments]
    return collections.namedtuple(schema.name.rpartition(":")[2], names, defaults=values)
