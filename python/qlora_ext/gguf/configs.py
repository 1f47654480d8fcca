"""Makes transformers read the configuration of GGUF files whose metadata it misreads, and all metadata faster."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.utils import is_gguf_available

from ..integrations._patches import extend
from . import gpt_oss, metadata

GGUF_CONFIG_ARCHS.setdefault(gpt_oss.ARCHITECTURE, gpt_oss.config_of)
for architecture in metadata.READ:
    GGUF_CONFIG_ARCHS.setdefault(architecture, metadata.config_of)

if is_gguf_available():

    @extend("gguf.gguf_reader:GGUFReader._get")
    def _get(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        self.data = np.asarray(self.data)  # views of a memmap would be memmaps
        return original(self, *args, **kwargs)
