"""Makes the gguf package read a file's metadata in less memory, which is otherwise more than that of a small model."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..integrations._patches import extend


@extend("gguf.gguf_reader:GGUFReader._get", optional=True)
def _get(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    self.data = np.asarray(self.data)  # views of a memmap would be memmaps
    return original(self, *args, **kwargs)
