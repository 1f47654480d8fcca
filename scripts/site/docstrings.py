"""Lets griffe read our docstrings: "Example:" is its "Examples:", and each exception under "Raises:" gets a line."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            head, mark, raises = text.partition("\nRaises:\n")
            raises, end, rest = raises.partition("\n\n")
            obj.docstring.value = head + mark + re.sub(r"(?<=\.)\s+(\w+Error: )", r"\n    \1", raises) + end + rest
