"""The formats of compressed-tensors with codes of 4 and 8 bits.

The tensors of a weight [N, K], with G = K / group_size::

    mxfp4-pack-quantized   weight_packed uint8 [N, K/2], E2M1, lo first; weight_scale uint8 [N, K/32], E8M0
    nvfp4-pack-quantized   weight_packed as above; weight_scale float8_e4m3fn [N, K/16], divided by weight_global_scale
    pack-quantized         weight_packed int32 [N, K*bits/32], lo first; weight_scale [N, G] in a floating-point dtype;
                           weight_shape [2]; asymmetric: weight_zero_point int32 [ceil(N*bits/32), G], packed along N,
                           or from versions before 0.10 int8 [N, G], from -8 to 7
    int-quantized          weight int8 [N, K]; weight_scale [N, G]; asymmetric: weight_zero_point int8 [N, G]
    float-quantized        weight float8_e4m3fn [N, K]; weight_scale [1], [N, 1], [N, G] or one per tile
    mxfp8-quantized        weight float8_e4m3fn [N, K]; weight_scale uint8 [N, K/32], E8M0

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
from . import e2m1, fp8, integers, nibbles
from .format import LOAD_ORIGINAL, Format, Given, Settings, tile_of

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
    "block_structure?": list,
    "actorder?": (str, bool),
    "scale_dtype?": str,
}
_ZERO_POINT = "weight_zero_point"
# The tensors that serve quantized activations, and the caches of keys and values.
_ACTIVATIONS = ("input_global_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point")


class _CompressedTensors(Format):
    """What the formats share: the configuration, and the scales of activations."""

    kind: str  # of the codes: int or float
    code = ""
    bits: tuple[int, ...] = (4,)
    strategies: tuple[str, ...] = ("channel", "group")
    usual_scale_dtype = torch.bfloat16
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
        if weights["num_bits"] not in self.bits or kind != self.kind:
            raise ValueError(
                f"{source}: expected {self.kind} weights of {' or '.join(map(str, self.bits))} bits for {self.name}, "
                f"got {excerpt(kind)} weights of {weights['num_bits']} bits, which are not supported; {LOAD_ORIGINAL}"
            )
        if weights.get("actorder") not in (None, False, "weight", "static"):
            raise ValueError(
                f"{source}: expected actorder 'weight' or none, got {excerpt(weights['actorder'])}: weights whose "
                "columns belong to groups in activation order are not supported; quantize the model without it"
            )
        if not symmetric and self.kind == "float":
            raise ValueError(f"{source}: expected symmetric weights for {self.name}, got asymmetric, not supported")
        dtypes = {"torch.float32": torch.float32, "torch.float16": torch.float16, "torch.uint8": torch.uint8}
        rows, columns, scale_shape = self._group(weights, source)
        return Settings(
            group_size=columns,
            group_rows=rows,
            symmetric=symmetric,
            scale_dtype=dtypes.get(weights.get("scale_dtype") or "", self.usual_scale_dtype),
            scale_shape=scale_shape,
            bits=weights["num_bits"],
            code=self.code,
        )

    def _group(self, weights: Mapping[str, Any], source: str) -> tuple[int | None, int | None, tuple[int, ...] | None]:
        """The rows and columns of a group, and the shape of the scales if it does not follow from them."""
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("channel" if size in (None, -1) else "group")
        if strategy not in self.strategies:
            raise ValueError(
                f"{source}: expected the strategy {' or '.join(self.strategies)} for {self.name}, got "
                f"{excerpt(strategy)}, which is not supported"
            )
        if strategy == "channel":
            return 1, None, None
        if strategy == "tensor":
            return None, None, (1,)
        if strategy == "block":
            return *tile_of(weights.get("block_structure"), f"{source}: block_structure"), None
        if not isinstance(size, int) or size < 1 or (self.block_size or size) != size:
            expected = "a positive group_size" if self.block_size is None else f"the group_size {self.block_size}"
            raise ValueError(f"{source}: expected {expected} for {self.name}, got {size}")
        return 1, size, None


class _E2M1(_CompressedTensors, e2m1.E2M1Format):
    """E2M1 codes with scales of 8 bits."""

    kind = "float"
    strategies = ("group", "tensor_group")
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
    scale_dtype = torch.float8_e4m3fn
    factor = "weight_global_scale"
    divides = True
    retained = (factor, *_ACTIVATIONS)
    block_size = e2m1.NV_BLOCK_SIZE


class FloatQuantized(_CompressedTensors, fp8.FP8Format):
    """``float-quantized``; see the module's docstring."""

    name = "float-quantized"
    kind = "float"
    bits = (8,)
    strategies: tuple[str, ...] = ("tensor", "channel", "group", "block")
    code = "e4m3"
    retained = _ACTIVATIONS


class MXFP8(FloatQuantized):
    """``mxfp8-quantized``; see the module's docstring."""

    name = "mxfp8-quantized"
    strategies = ("group",)
    usual_scale_dtype = torch.uint8
    block_size = e2m1.MX_BLOCK_SIZE


class _Integers(_CompressedTensors, integers.IntegerFormat):
    """Integers, with or without zero points."""

    kind = "int"

    def retains(self, name: str, tensor: Tensor) -> bool:
        return super().retains(name, tensor) or (name == _ZERO_POINT and tensor.dtype == torch.int8)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        super().check_scales(w4, settings, retained)
        if _ZERO_POINT in retained:
            assert w4.block_offsets is not None
            groups, stored = self.groups(settings, w4.shape), _unsigned(retained[_ZERO_POINT], settings.bits)
            stored = groups.to_blocks(stored.reshape(groups.shape)).to(w4.device)
            if not torch.equal(stored, w4.block_offsets):
                raise ValueError("expected the zero points of the checkpoint, got others")


class IntQuantized(_Integers):
    """``int-quantized``; see the module's docstring."""

    name = "int-quantized"
    bits = (8,)
    strategies = ("tensor", "channel", "group")
    codes = "weight"
    code_dtypes = ("I8",)
    retained = _ACTIVATIONS

    def tensors(self, settings: Settings) -> dict[str, bool]:
        names = {"weight": True, "weight_scale": True, **dict.fromkeys(self.retained, False)}
        return names | ({} if settings.symmetric else {_ZERO_POINT: True})

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups = self.groups(settings, shape)
        given = Given(tensors, self.tensors(settings), self.name, where)
        codes = given.take("weight", shape, torch.int8)
        scale = given.take_finite("weight_scale", groups.stored, *integers.FLOATS)
        zero_points = None
        if not settings.symmetric:
            integers.check_range(given, "weight_scale", scale, 8)
            zero_points = _unsigned(given.take(_ZERO_POINT, groups.stored, torch.int8), 8).reshape(groups.shape)
        return integers.weight(groups, _unsigned(codes, 8), scale.reshape(groups.shape), zero_points, dtype, 8)

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = self.groups(settings, w4.shape)
        scale = groups.from_blocks(w4.absmax).reshape(groups.stored).contiguous()
        return {"weight": (w4.packed ^ 128).view(torch.int8), "weight_scale": scale, **retained}


class Packed(_Integers):
    """``pack-quantized``; see the module's docstring."""

    name = "pack-quantized"
    bits = (4, 8)
    codes = "weight_packed"
    retained = ("weight_shape", "weight_g_idx", *_ACTIVATIONS)

    def tensors(self, settings: Settings) -> dict[str, bool]:
        names = {"weight_packed": True, "weight_scale": True, **dict.fromkeys(self.retained, False)}
        return names | {"weight_shape": True} | ({} if settings.symmetric else {_ZERO_POINT: True})

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups, bits = self.groups(settings, shape), settings.bits
        rows, columns = shape
        given = Given(tensors, self.tensors(settings), self.name, where)
        found = given.take("weight_shape", (2,), torch.int64, torch.int32).tolist()
        if found != [rows, columns]:
            given.refuse("weight_shape", str([rows, columns]), str(found))
        if "weight_g_idx" in given:
            integers.column_order(given, "weight_g_idx", groups, reorders=False)
        words = given.take("weight_packed", (rows, columns * bits // 32), torch.int32)
        scale = given.take_finite("weight_scale", groups.shape, *integers.FLOATS)
        zero_points = None
        if not settings.symmetric:
            integers.check_range(given, "weight_scale", scale, bits)
            zero_points = _zero_points(given, rows, groups.shape[1], bits)
        return integers.weight(groups, nibbles.from_words(words, bits), scale, zero_points, dtype, bits)

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups, bits = self.groups(settings, w4.shape), settings.bits
        tensors = {"weight_packed": nibbles.to_words(w4.packed, bits), "weight_scale": groups.from_blocks(w4.absmax)}
        if w4.block_offsets is not None:
            padding = (0, 0, 0, -len(w4.packed) % (32 // bits))
            zero_points = torch.nn.functional.pad(groups.from_blocks(w4.block_offsets), padding)
            tensors[_ZERO_POINT] = nibbles.words_of(zero_points.t(), bits).t().contiguous()
        return {**tensors, **retained}


def _unsigned(t: Tensor, bits: int) -> Tensor:
    """Signed integers of that many bits as codes, to which the middle of their range is added."""
    return t.view(torch.uint8) ^ 128 if bits == 8 else (t + (1 << bits - 1)).to(torch.uint8)


def _zero_points(given: Given, rows: int, groups: int, bits: int) -> Tensor:
    """uint8 [rows, groups], below 2^bits."""
    if given.dtype_of(_ZERO_POINT) == torch.int8:
        signed, end = given.take(_ZERO_POINT, (rows, groups), torch.int8), 1 << bits - 1
        if bool(((signed < -end) | (signed > end - 1)).any()):
            found = f"values from {signed.min().item()} to {signed.max().item()}"
            given.refuse(_ZERO_POINT, f"from {-end} to {end - 1}", found)
        return _unsigned(signed, bits)
    words = given.take(_ZERO_POINT, (-(-rows * bits // 32), groups), torch.int32)
    values = nibbles.values_of(words.t(), bits).t()
    if bool(values[rows:].any()):
        given.refuse(_ZERO_POINT, f"0 after its {rows} rows", "other values")
    return values[:rows]


# A format comes after those that have its tensors and more.
FORMATS: tuple[Format, ...] = (NVFP4(), MXFP4(), Packed(), IntQuantized(), FloatQuantized(), MXFP8())
