"""AWQ checkpoints in the layout ``gemm``: integer weights with a zero point per group, as AutoAWQ writes them.

The tensors of a weight [N, K], with G = K / group_size, are transposed, and words pack along N in AWQ's order
(``nibbles.py``)::

    qweight int32 [K, N/8]    qzeros int32 [G, N/8]    scales float16 [G, N]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..form import Form
from ..untrusted import check, excerpt
from ..weight import Weight4bit
from . import integers, nibbles
from .format import LOAD_ORIGINAL, Format, Given, Settings, excluded, group_size_of, matrix_of
from .integers import Groups

_SOURCE = "quantization_config of awq"
_SCHEMA = {
    "bits": int,
    "group_size": int,
    "version?": str,
    "format?": str,
    "backend?": str,
    "modules_to_not_convert?": [str],
}


class AWQ(Format):
    """The format ``awq``; see the module's docstring."""

    name = "awq"

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        check(config, _SCHEMA, _SOURCE)
        if config["bits"] != 4:
            raise ValueError(
                f"{_SOURCE}: expected 4 bits, got {config['bits']}, which are not supported; {LOAD_ORIGINAL}"
            )
        layout = (config.get("version") or config.get("format") or "gemm").lower()
        layout = "llm-awq" if config.get("backend") == "llm-awq" else layout
        if layout != "gemm":
            raise ValueError(
                f"{_SOURCE}: expected the layout gemm, got {excerpt(layout)}, which is not supported; convert the "
                "checkpoint with AutoAWQ"
            )
        return Settings(
            group_size=group_size_of(config, _SOURCE),
            symmetric=False,
            scale_dtype=torch.float16,
            ignored=excluded(["lm_head", *(config.get("modules_to_not_convert") or ())], _SOURCE),
        )

    def tensors(self, settings: Settings) -> dict[str, bool]:
        return dict.fromkeys(("qweight", "qzeros", "scales"), True)

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        return integers.form_of(self._groups(settings, shape), settings.scale_dtype, symmetric=False)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups = self._groups(settings, shape)
        rows, columns = shape
        given = Given(tensors, self.tensors(settings), self.name, where)
        words = given.take("qweight", (columns, rows // 8), torch.int32)
        zero_points = given.take("qzeros", (groups.count, rows // 8), torch.int32)
        scale = given.take_finite("scales", (groups.count, rows), *integers.FLOATS)
        integers.check_range(given, "scales", scale)
        return integers.weight(
            groups, nibbles.from_awq(words), scale.t(), nibbles.awq_values_of(zero_points).t(), dtype
        )

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        integers.check_scales(self._groups(settings, w4.shape), w4)

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = self._groups(settings, w4.shape)
        assert w4.block_offsets is not None
        return {
            "qweight": nibbles.to_awq(w4.packed),
            "qzeros": nibbles.awq_words_of(groups.from_blocks(w4.block_offsets).t()),
            "scales": groups.from_blocks(w4.absmax).t().contiguous(),
            **retained,
        }

    def _groups(self, settings: Settings, shape: Sequence[int]) -> Groups:
        rows, _ = matrix_of(self.name, shape)
        if rows % 8:
            raise ValueError(f"shape: expected a multiple of 8 rows for {self.name}, got {rows}")
        return Groups.of(self.name, settings, shape)
