"""gpt-oss' MXFP4 experts: E2M1 codes, and an E8M0 scale per 32 elements.

The tensors of a weight are ``blocks`` uint8 [..., rows, K/32, 16], element 2i of a block in the low nibble of byte i,
and ``scales`` uint8 [..., rows, K/32]. transformers' names are ``<weight>_blocks``, OpenAI's are ``<weight>.blocks``.
The rows of gate_up_proj (mlp1_weight) alternate between gate and up. ``read`` leaves them so; ``rows.py`` orders them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .e2m1 import MX_BLOCK_SIZE, E2M1Format
from .format import Settings


class MXFP4(E2M1Format):
    """The format ``mxfp4``; see the module's docstring."""

    name = "mxfp4"
    codes = "blocks"
    scales = "scales"
    block_size = MX_BLOCK_SIZE
    has_stacks = True

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        return Settings(MX_BLOCK_SIZE)

    def _codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // MX_BLOCK_SIZE, MX_BLOCK_SIZE // 2)

    def parse(self, key: str) -> tuple[str, str]:
        for kind in (self.codes, self.scales):
            weight = key.removesuffix(kind)
            if weight != key and weight.endswith(("_", ".")):
                return weight[:-1], kind
        return key, ""
