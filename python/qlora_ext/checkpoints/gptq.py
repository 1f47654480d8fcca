"""GPTQ checkpoints of 4 bits, of version 1 and 2, as AutoGPTQ and GPTQModel write them.

The tensors of a weight [N, K], with G = ceil(K / group_size), are transposed::

    qweight int32 [K/8, N]    packed along K
    qzeros  int32 [G, N/8]    packed along N; version 1 stores zero points minus 1, in 4 bits, so that 15 stands for 0
    scales  float16 [G, N]
    g_idx   int32 [K]         the group of each column, in any order with desc_act
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..form import Form
from ..untrusted import check, excerpt
from ..weight import Weight4bit
from . import integers, nibbles
from .format import LOAD_ORIGINAL, Format, Given, Settings, group_size_of, matrix_of, patterns
from .integers import Groups

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
    "lm_head?": bool,
    "dynamic?": dict,
    "modules_in_block_to_quantize?": list,
}
_BIASES = {"gptq": 1, "gptq_v2": 0}  # what a stored zero point lacks
_MIDDLE = 8  # the zero point of symmetric weights


class GPTQ(Format):
    """The format ``gptq``; see the module's docstring."""

    name = "gptq"
    retained = ("g_idx",)

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        check(config, _SCHEMA, _SOURCE)
        if config["bits"] != 4:
            raise ValueError(
                f"{_SOURCE}: expected 4 bits, got {config['bits']}, which are not supported; {LOAD_ORIGINAL}"
            )
        layout = (config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        layout = "marlin" if config.get("is_marlin_format") else layout
        if layout not in _BIASES or (config.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
            raise ValueError(
                f"{_SOURCE}: expected the checkpoint_format gptq or gptq_v2 in int32 words, got {excerpt(layout)} in "
                f"{excerpt(config.get('pack_dtype') or 'int32')} words, which is not supported"
            )
        group_size = group_size_of(config, _SOURCE)
        ignored = [] if config.get("lm_head") else [r"(.*\.)?lm_head$"]
        ignored += _exceptions(config)
        modules = _modules(config)
        return Settings(
            group_size=group_size,
            symmetric=config.get("sym") is not False,
            scale_dtype=torch.float16,
            zero_point_bias=_BIASES[layout],
            reorders=group_size is not None and not config.get("static_groups") and _has_order(config),
            targets=None if modules is None else patterns(modules, _SOURCE),
            ignored=patterns(ignored, _SOURCE),
        )

    def tensors(self, settings: Settings) -> dict[str, bool]:
        return {"qweight": True, "qzeros": True, "scales": True, "g_idx": settings.reorders}

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        return integers.form_of(self._groups(settings, shape), settings.scale_dtype, settings.symmetric)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups = self._groups(settings, shape)
        rows, columns = shape
        given = Given(tensors, self.tensors(settings), self.name, where)
        order = integers.column_order(given, "g_idx", groups, settings.reorders) if "g_idx" in given else None
        words = given.take("qweight", (columns // 8, rows), torch.int32)
        stored = nibbles.values_of(given.take("qzeros", (groups.count, rows // 8), torch.int32))
        scale = given.take_finite("scales", (groups.count, rows), *integers.FLOATS)
        bias, zero_points = settings.zero_point_bias, None
        if settings.symmetric:
            if not bool((stored == _MIDDLE - bias).all()):
                given.refuse("qzeros", f"{_MIDDLE - bias} throughout, because sym is true", "other values")
        else:
            integers.check_range(given, "scales", scale)
            zero_points = ((stored + bias) & 15).t()
        packed = nibbles.from_gptq(words)
        if order is not None:
            packed = nibbles.select_columns(packed, order)
        return integers.weight(groups, packed, scale.t(), zero_points, dtype, order)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        groups = self._groups(settings, w4.shape)
        integers.check_scales(groups, w4)
        integers.check_column_order(groups, w4, retained.get("g_idx"))

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = self._groups(settings, w4.shape)
        scale = groups.from_blocks(w4.absmax).t().contiguous()
        zero_points = torch.full_like(scale, _MIDDLE, dtype=torch.uint8)
        if w4.block_offsets is not None:
            zero_points = groups.from_blocks(w4.block_offsets).t()
        packed = w4.packed
        if w4.column_order is not None:
            packed = nibbles.select_columns(packed, w4.column_order.argsort())
        return {
            "qweight": nibbles.to_gptq(packed),
            "qzeros": nibbles.words_of((zero_points - settings.zero_point_bias) & 15),
            "scales": scale,
            **retained,
        }

    def _groups(self, settings: Settings, shape: Sequence[int]) -> Groups:
        rows, _ = matrix_of(self.name, shape)
        if rows % 8:
            raise ValueError(f"shape: expected a multiple of 8 rows for {self.name}, got {rows}")
        return Groups.of(self.name, settings, shape)


def _exceptions(config: Mapping[str, Any]) -> list[str]:
    """The modules that GPTQModel's ``dynamic`` excludes.

    Raises:
        ValueError: it gives modules other settings.
    """
    found = []
    for pattern, changes in _dynamic(config).items():
        if pattern.startswith("-:"):
            found.append(pattern[2:])
            continue
        names = ("bits", "group_size", "sym")
        if any(name in changes and changes[name] != config.get(name) for name in names):
            raise ValueError(
                f"{_SOURCE}: expected the same settings for all modules, got others in dynamic for {excerpt(pattern)}, "
                "which is not supported"
            )
    return found


def _dynamic(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that GPTQModel gives to the modules whose names match a pattern."""
    given = config.get("dynamic") or {}
    return {pattern: own if isinstance(own, dict) else {} for pattern, own in given.items()}


def _has_order(config: Mapping[str, Any]) -> bool:
    """Whether modules have columns in activation order."""
    return any(own.get("desc_act") for own in (config, *_dynamic(config).values()))


def _modules(config: Mapping[str, Any]) -> list[str] | None:
    """Patterns of the modules in ``modules_in_block_to_quantize``, a list of names or of lists of names."""
    given = config.get("modules_in_block_to_quantize")
    if given is None:
        return None
    names = [name for part in given for name in (part if isinstance(part, list) else [part])]
    check(names, [str], f"{_SOURCE}: modules_in_block_to_quantize")
    return [rf".*\.{re.escape(name)}$" for name in names]
