"""The 4-bit formats of compressed-tensors: ``mxfp4-pack-quantized``, ``nvfp4-pack-quantized`` and ``pack-quantized``.

The tensors of a weight [N, K], with G = K / group_size::

    mxfp4-pack-quantized   weight_packed uint8 [N, K/2], E2M1, lo first; weight_scale uint8 [N, K/32], E8M0
    nvfp4-pack-quantized   weight_packed as above; weight_scale float8_e4m3fn [N, K/16], divided by weight_global_scale
    pack-quantized         weight_packed int32 [N, K/8], lo first; weight_scale [N, G] in a floating-point dtype;
                           weight_shape [2]; asymmetric: weight_zero_point int32 [ceil(N/8), G], packed along N, or from
                           versions before 0.10 int8 [N, G], from -8 to 7

Quantized activations are not applied: their scales are kept and saved, and the weight is multiplied by the activations
as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..untrusted import check, excerpt
from ..weight import Weight4bit
from . import e2m1, integers, nibbles
from .format import LOAD_ORIGINAL, Format, Given, Settings

_SOURCE = "quantization_config of compressed-tensors"
_SCHEMA = {
    "config_groups": dict,
    "format?": str,
    "transform_config?": dict,
    "sparsity_config?": dict,
}
_GROUP = {"weights?": dict, "format?": str}
_WEIGHTS = {
    "num_bits": int,
    "type?": str,
    "symmetric?": bool,
    "strategy?": str,
    "group_size?": int,
    "actorder?": (str, bool),
    "scale_dtype?": str,
}
_ZERO_POINT = "weight_zero_point"
# The tensors that serve quantized activations, and the caches of keys and values.
_ACTIVATIONS = ("input_global_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point")


class _CompressedTensors(Format):
    """What the formats share: the configuration, and the scales of activations."""

    kind: str  # of the codes: int or float
    block_size: int | None = None  # None: of any size

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        check(config, _SCHEMA, _SOURCE)
        if (config.get("transform_config") or {}).get("config_groups"):
            raise ValueError(
                f"{_SOURCE}: expected no transform_config, got rotations of inputs, which are not supported"
            )
        sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
        if sparsity != "dense":
            raise ValueError(f"{_SOURCE}: expected no sparsity, got {excerpt(sparsity)}, which is not supported")
        found: list[Settings] = []
        for name, group in config["config_groups"].items():
            source = f"{_SOURCE}: config_groups.{excerpt(name)}"
            check(group, _GROUP, source)
            if group.get("weights") is not None:
                found.append(self._group_settings(group["weights"], f"{source}.weights"))
        if not found or any(other != found[0] for other in found):
            raise ValueError(
                f"{_SOURCE}: expected one kind of quantized weights in config_groups, got "
                f"{f'{len(found)} groups that differ, which are not supported' if found else 'none'}"
            )
        return found[0]

    def _group_settings(self, weights: Any, source: str) -> Settings:
        check(weights, _WEIGHTS, source)
        kind, symmetric = (weights.get("type") or "int").lower(), weights.get("symmetric") is not False
        if weights["num_bits"] != 4 or kind != self.kind:
            raise ValueError(
                f"{source}: expected {self.kind} weights of 4 bits for {self.name}, got {excerpt(kind)} weights of "
                f"{weights['num_bits']} bits, which are not supported; {LOAD_ORIGINAL}"
            )
        if weights.get("actorder") not in (None, False, "weight", "static"):
            raise ValueError(
                f"{source}: expected actorder 'weight' or none, got {excerpt(weights['actorder'])}: weights whose "
                "columns belong to groups in activation order are not supported; quantize the model without it"
            )
        if not symmetric and self.kind == "float":
            raise ValueError(f"{source}: expected symmetric weights for {self.name}, got asymmetric, not supported")
        dtypes = {"torch.float32": torch.float32, "torch.float16": torch.float16}
        return Settings(
            group_size=self._group_size(weights, source),
            symmetric=symmetric,
            scale_dtype=dtypes.get(weights.get("scale_dtype") or "", torch.bfloat16),
        )

    def _group_size(self, weights: Mapping[str, Any], source: str) -> int | None:
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("channel" if size in (None, -1) else "group")
        strategies = ("channel", "group") if self.block_size is None else ("group", "tensor_group")
        if strategy not in strategies:
            raise ValueError(
                f"{source}: expected the strategy {' or '.join(strategies)} for {self.name}, got {excerpt(strategy)}, "
                "which is not supported"
            )
        if strategy == "channel":
            return None
        if not isinstance(size, int) or size < 1 or (self.block_size or size) != size:
            expected = "a positive group_size" if self.block_size is None else f"the group_size {self.block_size}"
            raise ValueError(f"{source}: expected {expected} for {self.name}, got {size}")
        return size


class _E2M1(_CompressedTensors, e2m1.E2M1Format):
    """E2M1 codes with scales of 8 bits."""

    kind = "float"
    codes = "weight_packed"
    block_size: int


class MXFP4(_E2M1):
    """``mxfp4-pack-quantized``; see the module's docstring."""

    name = "mxfp4-pack-quantized"
    retained = _ACTIVATIONS
    block_size = e2m1.MX_BLOCK_SIZE


class NVFP4(_E2M1):
    """``nvfp4-pack-quantized``; see the module's docstring."""

    name = "nvfp4-pack-quantized"
    factor = "weight_global_scale"
    divides = True
    retained = (factor, *_ACTIVATIONS)
    block_size = e2m1.NV_BLOCK_SIZE


class Packed(_CompressedTensors, integers.IntegerFormat):
    """``pack-quantized`` with 4 bits; see the module's docstring."""

    name = "pack-quantized"
    kind = "int"
    retained = ("weight_shape", "weight_g_idx", *_ACTIVATIONS)

    def tensors(self, settings: Settings) -> dict[str, bool]:
        names = {"weight_packed": True, "weight_scale": True, **dict.fromkeys(self.retained, False)}
        return names | {"weight_shape": True} | ({} if settings.symmetric else {_ZERO_POINT: True})

    def retains(self, name: str, tensor: Tensor) -> bool:
        return super().retains(name, tensor) or (name == _ZERO_POINT and tensor.dtype == torch.int8)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups = self.groups(settings, shape)
        rows, columns = shape
        given = Given(tensors, self.tensors(settings), self.name, where)
        found = given.take("weight_shape", (2,), torch.int64, torch.int32).tolist()
        if found != [rows, columns]:
            given.refuse("weight_shape", str([rows, columns]), str(found))
        if "weight_g_idx" in given:
            integers.column_order(given, "weight_g_idx", groups, reorders=False)
        words = given.take("weight_packed", (rows, columns // 8), torch.int32)
        scale = given.take_finite("weight_scale", (rows, groups.count), *integers.FLOATS)
        zero_points = None
        if not settings.symmetric:
            integers.check_range(given, "weight_scale", scale)
            zero_points = _zero_points(given, rows, groups.count)
        return integers.weight(groups, nibbles.from_words(words), scale, zero_points, dtype)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        super().check_scales(w4, settings, retained)
        if _ZERO_POINT in retained:
            assert w4.block_offsets is not None
            stored = (retained[_ZERO_POINT] + 8).to(torch.uint8)
            stored = self.groups(settings, w4.shape).to_blocks(stored).to(w4.device)
            if not torch.equal(stored, w4.block_offsets):
                raise ValueError("expected the zero points of the checkpoint, got others")

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = self.groups(settings, w4.shape)
        tensors = {"weight_packed": nibbles.to_words(w4.packed), "weight_scale": groups.from_blocks(w4.absmax)}
        if w4.block_offsets is not None:
            zero_points = torch.nn.functional.pad(groups.from_blocks(w4.block_offsets), (0, 0, 0, -len(w4.packed) % 8))
            tensors[_ZERO_POINT] = nibbles.words_of(zero_points.t()).t().contiguous()
        return {**tensors, **retained}


def _zero_points(given: Given, rows: int, groups: int) -> Tensor:
    """uint8 [rows, groups], from 0 to 15."""
    if given.dtype_of(_ZERO_POINT) == torch.int8:
        signed = given.take(_ZERO_POINT, (rows, groups), torch.int8)
        if bool(((signed < -8) | (signed > 7)).any()):
            given.refuse(_ZERO_POINT, "from -8 to 7", f"values from {signed.min().item()} to {signed.max().item()}")
        return (signed + 8).to(torch.uint8)
    words = given.take(_ZERO_POINT, (-(-rows // 8), groups), torch.int32)
    values = nibbles.values_of(words.t()).t()
    if bool(values[rows:].any()):
        given.refuse(_ZERO_POINT, f"0 after its {rows} rows", "other values")
    return values[:rows]
