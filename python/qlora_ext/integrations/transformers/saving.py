"""Makes ``save_pretrained`` write deferred tensors."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from .._patches import extend
from .deferred import has_deferred, write_file


@extend("transformers.modeling_utils:safe_save_file")
def save_file(original: Any, tensors: Any, filename: Any, metadata: Any = None) -> Any:
    if has_deferred(tensors):
        return write_file(tensors, pathlib.Path(os.fspath(filename)), metadata)
    return original(tensors, filename, metadata=metadata)
