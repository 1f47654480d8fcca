"""An exported program keeps a 4-bit weight once, where ``torch.export.export(strict=True)`` reads it as constants.

``_patches`` lists what this module changes in torch.
"""

from __future__ import annotations

from typing import Any

from ..weight import Weight4bit
from ._patches import extend


@extend("torch.export.exported_program:ExportedProgram.__init__")
def init_program(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    read = {*self.graph_signature.inputs_to_parameters.values()}
    for name, t in [*self.state_dict.items()]:
        if isinstance(t, Weight4bit) and name not in read:
            del self.state_dict[name]
