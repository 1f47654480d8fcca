"""gpt-oss' MXFP4 experts: E2M1 codes, and an E8M0 scale per 32 elements.

The tensors of a weight are ``blocks`` uint8 [..., rows, K/32, 16], element 2i of a block in the low nibble of byte i,
and ``scales`` uint8 [..., rows, K/32]. transformers' names are ``<weight>_blocks``, OpenAI's are ``<weight>.blocks``.
The rows of gate_up_proj (mlp1_weight) alternate between gate and up. ``read`` leaves them so; ``rows.py`` orders them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..form import Form
from ..untrusted import check
from ..weight import Weight4bit
from . import e2m1, nibbles, scales
from .e2m1 import MX_BLOCK_SIZE
from .format import Format, Given, Settings, excluded

_SOURCE = "quantization_config of mxfp4"


class MXFP4(Format):
    """The format ``mxfp4``; see the module's docstring."""

    name = "mxfp4"

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        check(config, {"modules_to_not_convert?": [str]}, _SOURCE)
        return Settings(MX_BLOCK_SIZE, ignored=excluded(config.get("modules_to_not_convert"), _SOURCE))

    def tensors(self, settings: Settings) -> dict[str, bool]:
        return {"blocks": True, "scales": True}

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        return e2m1.form_of(self.name, shape, MX_BLOCK_SIZE)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        form = self.form(settings, shape)
        given = Given(tensors, self.tensors(settings), self.name, where)
        groups = (*shape[:-1], shape[-1] // MX_BLOCK_SIZE)
        packed = given.take("blocks", (*groups, MX_BLOCK_SIZE // 2), torch.uint8)
        codes = given.take("scales", groups, torch.uint8)
        return e2m1.weight(form, packed, e2m1.e8m0(given, "scales", codes), shape, dtype)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        e2m1.check_table(w4, scales.e8m0_table(torch.device("cpu")))

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = (*w4.shape[:-1], w4.shape[-1] // MX_BLOCK_SIZE)
        return {
            "blocks": nibbles.swap(w4.packed).view(*groups, MX_BLOCK_SIZE // 2),
            "scales": w4.absmax.reshape(groups),
            **retained,
        }


def names_of(tensor: str) -> tuple[str, str] | None:
    """The weight's name and its tensor's in the name of a file's tensor, or None if it belongs to no MXFP4 weight."""
    for kind in ("blocks", "scales"):
        weight = tensor.removesuffix(kind)
        if weight != tensor and weight.endswith(("_", ".")):
            return weight[:-1], kind
    return None
