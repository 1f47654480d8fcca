"""Makes transformers build the configuration of GGUF files whose metadata it misreads, or does not read."""

from __future__ import annotations

from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from . import gpt_oss, metadata

GGUF_CONFIG_ARCHS.setdefault(gpt_oss.ARCHITECTURE, gpt_oss.config_of)
for architecture in metadata.READ:
    GGUF_CONFIG_ARCHS.setdefault(architecture, metadata.config_of)
