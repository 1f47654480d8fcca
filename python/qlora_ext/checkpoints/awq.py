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

from ..untrusted import check, excerpt
from ..weight import Weight4bit
from . import integers, nibbles
from .format import Given, Settings, check_bits, group_size_of
from .integers import IntegerFormat

_SOURCE = "quantization_config of awq"
_SCHEMA = {
    "bits": int,
    "group_size": int,
    "version?": str,
    "format?": str,
    "backend?": str,
}


class AWQ(IntegerFormat):
    """The format ``awq``; see the module's docstring."""

    name = "awq"
    codes = "qweight"
    rows_together = 8

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        check(config, _SCHEMA, _SOURCE)
        check_bits(config["bits"], (4,), _SOURCE)
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
        )

    def tensors(self, settings: Settings) -> dict[str, bool]:
        return dict.fromkeys(("qweight", "qzeros", "scales"), True)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups = self.groups(settings, shape)
        rows, columns = shape
        given = Given(tensors, self.tensors(settings), self.name, where)
        words = given.take("qweight", (columns, rows // 8), torch.int32)
        zero_points = given.take("qzeros", (groups.shape[1], rows // 8), torch.int32)
        scale = given.take_finite("scales", groups.shape[::-1], *integers.FLOATS)
        integers.check_range(given, "scales", scale)
        return integers.weight(
            groups, nibbles.from_awq(words), scale.t(), nibbles.awq_values_of(zero_points).t(), dtype
        )

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = self.groups(settings, w4.shape)
        assert w4.block_offsets is not None
        return {
            "qweight": nibbles.to_awq(w4.packed),
            "qzeros": nibbles.awq_words_of(groups.from_blocks(w4.block_offsets).t()),
            "scales": groups.from_blocks(w4.absmax).t().contiguous(),
            **retained,
        }
