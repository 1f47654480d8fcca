"""MLX checkpoints of 4, 5, 6 and 8 bits in the mode ``affine``: w = q * scale + bias in groups of a row.

The tensors of a weight [N, K], with G = K / group_size, are ``weight`` uint32 [N, K/8], lo first, and ``scales`` and
``biases`` [N, G] in a floating-point dtype. Codes of other bits are a stream of bits as well, the lowest bits first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._internal import bit_planes
from ..dtype_names import name_of
from ..form import Form
from ..untrusted import check, excerpt
from ..weight import Weight4bit, weight_of
from . import nibbles
from .format import LOAD_ORIGINAL, Format, Given, Settings, check_bits, matrix_of
from .integers import FLOATS

_SOURCE = "quantization_config of mlx"
_SCHEMA = {"bits": int, "group_size": int, "mode?": str}
_GROUP_SIZES = (32, 64, 128)
_BITS = (2, 3, 4, 5, 6, 8)
PACKED_BITS = (4, 5, 6, 8)
_CHUNK = 1 << 18  # elements that are decoded at a time


class MLX(Format):
    """The format ``mlx``; see the module's docstring."""

    name = "mlx"
    codes = "weight"

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        found = _settings(config, _SOURCE)
        check_bits(found.bits, PACKED_BITS, _SOURCE)
        layers = {
            name: _settings(own, f"{_SOURCE}: {excerpt(name, 200)}")
            for name, own in config.items()
            if isinstance(own, dict)
        }
        return dataclasses.replace(found, layers=layers)

    def tensors(self, settings: Settings) -> dict[str, bool]:
        return dict.fromkeys(("weight", "scales", "biases"), True)

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        size, dtype = _group_size(settings, shape), name_of(settings.scale_dtype)
        check_bits(settings.bits, PACKED_BITS, self.name)
        return Form(f"uint{settings.bits}", dtype, size, offsets=dtype)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        words, scale, bias = self._take(tensors, shape, settings, where)
        return weight_of(
            self.form(settings, shape),
            packed=_packed(words, settings.bits),
            absmax=scale.reshape(-1),
            block_offsets=bias.reshape(-1),
            shape=torch.Size(shape),
            dtype=dtype,
        )

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        """Does nothing, because the format has a scale and a bias for each block."""

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert w4.block_offsets is not None
        rows = w4.shape[0]
        return {
            "weight": _words(w4.packed, settings.bits).view(torch.uint32),
            "scales": w4.absmax.view(rows, -1),
            "biases": w4.block_offsets.view(rows, -1),
            **retained,
        }

    def decode(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Tensor:
        """The values of a weight of any number of bits, rounded once from float32.

        Raises:
            ValueError: as in ``read``.
        """
        words, scale, bias = self._take(tensors, shape, settings, where)
        out = torch.empty(tuple(shape), dtype=dtype, device=words.device)
        rows = max(1, _CHUNK // shape[1])
        parts = (t.split(rows) for t in (out, words, scale, bias))
        for target, codes, factor, offset in zip(*parts, strict=True):
            values = nibbles.from_stream(codes, settings.bits).view(*factor.shape, -1).float()
            target.copy_((values * factor.float().unsqueeze(-1) + offset.float().unsqueeze(-1)).view_as(target))
        return out

    def _take(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], settings: Settings, where: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = (shape[0], shape[1] // _group_size(settings, shape))
        given = Given(tensors, self.tensors(settings), self.name, where)
        words = given.take("weight", (shape[0], shape[1] * settings.bits // 32), torch.uint32)
        scale = given.take_finite("scales", groups, *FLOATS)
        bias = given.take_finite("biases", groups, scale.dtype)
        if not bool((scale.float() * (1 << settings.bits)).isfinite().all()):
            given.refuse("scales", "such that all values are finite in float32", "larger ones")
        return words, scale, bias


def _packed(words: Tensor, bits: int) -> Tensor:
    """Our packed codes [N, K*bits/8] of the words of a stream [N, K*bits/32]."""
    if bits in (4, 8):
        return nibbles.from_words(words, bits)
    out = torch.empty((len(words), words.shape[1] * 4), dtype=torch.uint8, device=words.device)
    rows = max(1, _CHUNK // out.shape[1])
    for source, target in zip(words.split(rows), out.split(rows), strict=True):
        target.copy_(bit_planes.pack(nibbles.from_stream(source, bits), bits))
    return out


def _words(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``_packed``."""
    if bits in (4, 8):
        return nibbles.to_words(packed, bits)
    out = torch.empty((len(packed), packed.shape[1] // 4), dtype=torch.int32, device=packed.device)
    rows = max(1, _CHUNK // packed.shape[1])
    for source, target in zip(packed.split(rows), out.split(rows), strict=True):
        target.copy_(nibbles.to_stream(bit_planes.unpack(source, bits), bits))
    return out


def _settings(config: Mapping[str, Any], source: str) -> Settings:
    check(config, _SCHEMA, source)
    mode = config.get("mode") or "affine"
    if mode != "affine":
        raise ValueError(
            f"{source}: expected the mode affine, got {excerpt(mode)}, which is not supported; {LOAD_ORIGINAL}"
        )
    for name, expected in (("bits", _BITS), ("group_size", _GROUP_SIZES)):
        if config[name] not in expected:
            raise ValueError(f"{source}: expected {name} among {', '.join(map(str, expected))}, got {config[name]}")
    return Settings(config["group_size"], symmetric=False, bits=config["bits"])


def _group_size(settings: Settings, shape: Sequence[int]) -> int:
    _, columns = matrix_of(MLX.name, shape)
    size = settings.group_size
    assert size is not None
    if columns % size:
        raise ValueError(
            f"shape: expected rows of a multiple of {size} elements for {MLX.name}, got groups of {size} in rows of "
            f"{columns}"
        )
    return size
