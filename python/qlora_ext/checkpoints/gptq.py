"""GPTQ checkpoints of 4 or 8 bits, of version 1 and 2, as AutoGPTQ and GPTQModel write them.

The tensors of a weight [N, K], with G = ceil(K / group_size), are transposed::

    qweight int32 [K*bits/32, N]    packed along K
    qzeros  int32 [G, N*bits/32]    packed along N; version 1 stores zero points minus 1, in 4 bits, so that 15 is 0
    scales  float16 [G, N]
    g_idx   int32 [K]               the group of each column, in any order with desc_act
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

_SOURCE = "quantization_config of gptq"
_SCHEMA = {
    "bits": int,
    "group_size": int,
    "sym?": bool,
    "desc_act?": bool,
    "static_groups?": bool,
    "checkpoint_format?": str,
    "format?": str,
    "is_marlin_format?": bool,
    "pack_dtype?": str,
    "dynamic?": dict,
}
_BIASES = {"gptq": 1, "gptq_v2": 0}  # what a stored zero point lacks


class GPTQ(IntegerFormat):
    """The format ``gptq``; see the module's docstring."""

    name = "gptq"
    codes = "qweight"
    rows_together = 8
    retained = ("g_idx",)

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        check(config, _SCHEMA, _SOURCE)
        check_bits(config["bits"], (4, 8), _SOURCE)
        layout = (config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        layout = "marlin" if config.get("is_marlin_format") else layout
        if layout not in _BIASES or (config.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
            raise ValueError(
                f"{_SOURCE}: expected the checkpoint_format gptq or gptq_v2 in int32 words, got {excerpt(layout)} in "
                f"{excerpt(config.get('pack_dtype') or 'int32')} words, which is not supported"
            )
        group_size = group_size_of(config, _SOURCE)
        _check_dynamic(config)
        return Settings(
            group_size=group_size,
            symmetric=config.get("sym") is not False,
            scale_dtype=torch.float16,
            zero_point_bias=_BIASES[layout],
            bits=config["bits"],
            reorders=group_size is not None and not config.get("static_groups") and _has_order(config),
        )

    def tensors(self, settings: Settings) -> dict[str, bool]:
        return {"qweight": True, "qzeros": True, "scales": True, "g_idx": settings.reorders}

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups, bits = self.groups(settings, shape), settings.bits
        rows, columns = shape
        given = Given(tensors, self.tensors(settings), self.name, where)
        order = integers.column_order(given, "g_idx", groups, settings.reorders) if "g_idx" in given else None
        words = given.take("qweight", (columns * bits // 32, rows), torch.int32)
        stored = nibbles.values_of(given.take("qzeros", (groups.shape[1], rows * bits // 32), torch.int32), bits)
        scale = given.take_finite("scales", groups.shape[::-1], *integers.FLOATS)
        bias, zero_points = settings.zero_point_bias, None
        if settings.symmetric:
            middle = _middle(bits) - bias
            if not bool((stored == middle).all()):
                given.refuse("qzeros", f"{middle} throughout, because sym is true", "other values")
        else:
            integers.check_range(given, "scales", scale, bits)
            zero_points = ((stored + bias) & (1 << bits) - 1).t()
        packed = nibbles.from_gptq(words, bits)
        if order is not None:
            packed = nibbles.select_columns(packed, order, bits)
        return integers.weight(groups, packed, scale.t(), zero_points, dtype, bits, order)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        super().check_scales(w4, settings, retained)
        integers.check_column_order(self.groups(settings, w4.shape), w4, retained.get("g_idx"))

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups, bits = self.groups(settings, w4.shape), settings.bits
        scale = groups.from_blocks(w4.absmax).t().contiguous()
        zero_points = torch.full_like(scale, _middle(bits), dtype=torch.uint8)
        if w4.block_offsets is not None:
            zero_points = groups.from_blocks(w4.block_offsets).t()
        packed = w4.packed
        if w4.column_order is not None:
            packed = nibbles.select_columns(packed, w4.column_order.argsort(), bits)
        return {
            "qweight": nibbles.to_gptq(packed, bits),
            "qzeros": nibbles.words_of((zero_points - settings.zero_point_bias) & (1 << bits) - 1, bits),
            "scales": scale,
            **retained,
        }


def _middle(bits: int) -> int:
    """The zero point of symmetric weights."""
    return 1 << bits - 1


def _check_dynamic(config: Mapping[str, Any]) -> None:
    """Rejects modules to which GPTQModel's ``dynamic`` gives other settings; it may exclude modules.

    Raises:
        ValueError: it gives modules other settings.
    """
    for pattern, changes in _dynamic(config).items():
        same = all(changes.get(name, config.get(name)) == config.get(name) for name in ("bits", "group_size", "sym"))
        if not same and not pattern.startswith("-:"):
            raise ValueError(
                f"{_SOURCE}: expected the same settings for all modules, got others in dynamic for {excerpt(pattern)}, "
                "which is not supported"
            )


def _dynamic(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that GPTQModel gives to the modules whose names match a pattern."""
    given = config.get("dynamic") or {}
    return {pattern: own if isinstance(own, dict) else {} for pattern, own in given.items()}


def _has_order(config: Mapping[str, Any]) -> bool:
    """Whether modules have columns in activation order."""
    return any(own.get("desc_act") for own in (config, *_dynamic(config).values()))
