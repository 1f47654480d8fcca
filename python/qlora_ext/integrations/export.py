"""``torch.export.export(strict=True)`` keeps 4-bit weights once: as the constants that the graph reads.

This module is imported automatically with torch's exporter. ``_patches`` lists what it changes there.
"""

from __future__ import annotations

from typing import Any

from ..weight import Weight4bit
from ._patches import extend


@extend("torch.export._trace:_export")
def export(original: Any, *args: Any, **kwargs: Any) -> Any:
    program = original(*args, **kwargs)
    read = {*program.graph_signature.inputs_to_parameters.values()}
    for name, t in [*program.state_dict.items()]:
        if isinstance(t, Weight4bit) and name not in read:
            del program.state_dict[name]
    return program
