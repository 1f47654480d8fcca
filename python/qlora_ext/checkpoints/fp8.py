"""FP8: codes that are float8 numbers, with a scale per tile, per block of a row, per row or per tensor.

The tensors of a weight [N, K] are ``weight`` float8_e4m3fn or float8_e5m2 [N, K], and its scales, which multiply it:
float32 or 16-bit numbers, or E8M0 codes. Tiles have ``weight_block_size`` rows and columns in the configuration of the
format ``fp8``, and the last ones may be smaller: [ceil(N/128), ceil(K/128)]. Scales of activations are kept and saved,
but activations are not quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._internal.scale_tables import E8M0_NAN, e8m0_table
from ..dtype_names import name_of
from ..form import Form
from ..formats import TABLE8
from ..untrusted import check, excerpt
from ..weight import Weight4bit, weight_of
from .e2m1 import MX_BLOCK_SIZE, E2M1Format
from .format import LOAD_ORIGINAL, Format, Given, Settings, check_repeats, tile_of
from .groups import Groups
from .integers import FLOATS

_SOURCE = "quantization_config of fp8"
_SCHEMA = {"fmt?": str, "weight_block_size?": list, "activation_scheme?": str}
_CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# The bits of a code without its sign from which on it is NaN or infinite.
_NOT_FINITE = {"e4m3": 0x7F, "e5m2": 0x7C}
_E8M0 = (torch.float8_e8m0fnu, torch.uint8)
_CHUNK = 1 << 18  # bytes


class FP8Format(Format):
    """What the formats of FP8 share.

    Attributes:
        scales: the name of the tensor of scales.
    """

    codes = "weight"
    code_dtypes = ("F8_E4M3", "F8_E5M2")
    scales = "weight_scale"

    def tensors(self, settings: Settings) -> dict[str, bool]:
        return {self.codes: True, self.scales: True, **dict.fromkeys(self.retained, False)}

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        scales = TABLE8 if settings.scale_dtype in _E8M0 else name_of(settings.scale_dtype)
        return Form(settings.code, scales, Groups.of(self.name, settings, shape).block_size)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        groups = Groups.of(self.name, settings, shape)
        given = Given(tensors, self.tensors(settings), self.name, where)
        packed = _finite_bytes(given, given.take(self.codes, shape, _CODES[settings.code]), settings.code)
        dtypes = (settings.scale_dtype,) if settings.scale_dtype in _E8M0 else FLOATS
        scale = given.take(self.scales, groups.stored, *dtypes)
        table = None
        if scale.dtype in _E8M0:
            scale, table = scale.contiguous().view(torch.uint8), e8m0_table(scale.device)
            if bool((scale == E8M0_NAN).any()):
                given.refuse(self.scales, "E8M0 codes of numbers", f"0x{E8M0_NAN:02X}, which is NaN")
        values = scale.float() if table is None else table[scale.long()]
        if not bool((values * torch.finfo(_CODES[settings.code]).max).isfinite().all()):
            given.refuse(self.scales, "such that all values are finite in float32", "NaN, infinite or larger values")
        settings = dataclasses.replace(settings, scale_dtype=given.dtype_of(self.scales))
        return weight_of(
            self.form(settings, shape),
            packed=packed,
            absmax=groups.to_blocks(scale.reshape(groups.shape)),
            scale_table=table,
            shape=torch.Size(shape),
            dtype=dtype,
        )

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        groups = Groups.of(self.name, settings, w4.shape)
        check_repeats("absmax", groups.to_blocks(groups.from_blocks(w4.absmax)), w4.absmax)
        if w4.scale_table is not None and not torch.equal(w4.scale_table.cpu(), e8m0_table()):
            raise ValueError("expected the table of scales of the checkpoint, got another")

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = Groups.of(self.name, settings, w4.shape)
        scale = groups.from_blocks(w4.absmax).reshape(groups.stored).contiguous()
        if w4.scale_table is not None:
            scale = scale.view(settings.scale_dtype)
        return {self.codes: w4.packed.view(_CODES[settings.code]), self.scales: scale, **retained}


def _finite_bytes(given: Given, codes: Tensor, code: str) -> Tensor:
    """A copy of the bytes of ``codes``, which are numbers."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    source = codes.contiguous().view(torch.uint8).view(-1)
    for part, target in zip(source.split(_CHUNK), out.view(-1).split(_CHUNK), strict=True):
        torch.bitwise_and(part, 0x7F, out=target)
        if bool((target >= _NOT_FINITE[code]).any()):
            given.refuse(FP8Format.codes, f"{code.upper()} codes of numbers", "NaN or infinity")
        target.copy_(part)
    return out


class FP8(FP8Format):
    """The format ``fp8``; see the module's docstring.

    Args:
        scales: ``weight_scale_inv``, as DeepSeek-V3 and transformers call them, ``weight_scale``, as AutoFP8 does, or
            ``scale``, as DeepSeek-V4 does.
    """

    name = "fp8"
    retained = ("activation_scale", "input_scale", "k_scale", "v_scale")

    def __init__(self, scales: str = "weight_scale_inv") -> None:
        self.scales = scales

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        check(config, _SCHEMA, _SOURCE)
        code = (config.get("fmt") or "e4m3").lower().removeprefix("float8_").removesuffix("fn")
        if code not in _CODES:
            raise ValueError(f"{_SOURCE}: expected fmt e4m3 or e5m2, got {excerpt(code)}, which is not supported")
        tile = config.get("weight_block_size")
        if tile is None:
            return Settings(None, None, scale_dtype=torch.float32, scale_shape=(), bits=8, code=code)
        rows, columns = tile_of(tile, f"{_SOURCE}: weight_block_size")
        return Settings(columns, rows, scale_dtype=torch.float32, bits=8, code=code)


class DeepSeekFP4(E2M1Format):
    """DeepSeek-V4's experts in MXFP4, beside weights in FP8: ``weight`` int8 [N, K/2] and ``scale`` E8M0 [N, K/32]."""

    name = "fp8 with expert_dtype fp4"
    codes = "weight"
    code_dtypes = ("I8",)
    scales = "scale"
    block_size = MX_BLOCK_SIZE
    codes_dtype = torch.int8
    scale_dtype = torch.float8_e8m0fnu

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        return Settings(MX_BLOCK_SIZE)


def formats(config: Mapping[str, Any]) -> tuple[Format, ...]:
    """The formats of weights in a checkpoint with that ``quantization_config``."""
    check(config, {"expert_dtype?": str}, _SOURCE)
    experts = (config.get("expert_dtype") or "fp8").lower()
    if experts not in ("fp8", "fp4"):
        raise ValueError(
            f"{_SOURCE}: expected expert_dtype fp8 or fp4, got {excerpt(experts)}, not supported; {LOAD_ORIGINAL}"
        )
    names = ("weight_scale_inv", "weight_scale", "scale")
    return (*map(FP8, names), *((DeepSeekFP4(),) if experts == "fp4" else ()))
