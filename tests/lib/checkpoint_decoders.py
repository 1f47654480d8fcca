"""The values of weights in the packed formats of checkpoints, by the formats' published formulas.

The decoders are written in numpy from each format's own reference and share no code with the package:

- MXFP4: openai/gpt-oss, ``gpt_oss/torch/weights.py``
- compressed-tensors: ``quantization/lifecycle/forward_helpers.py`` (``_dequantize``) and its packing helpers
- ModelOpt: ``quantization/qtensor/nvfp4_tensor.py``
- AWQ: AutoAWQ, ``awq/utils/packing_utils.py``
- GPTQ: AutoGPTQ, ``nn_modules/qlinear/qlinear_cuda.py``; columns in activation order have the group ``g_idx[k]``
- FP8: transformers, ``integrations/finegrained_fp8.py`` (``Fp8Dequantize``): codes times the scale of their tile
- MLX: the documentation of ``mlx.core.quantize`` and ``dequantize``, mode ``affine``
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference import F32

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def e4m3_value(code: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinity, and one NaN per sign."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


E4M3 = np.array([e4m3_value(code) for code in range(256)], F32)


def array(t: Tensor) -> np.ndarray:
    """The values of a tensor; of 8-bit floating-point numbers their bits, of 16-bit ones float32."""
    if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        t = t.view(torch.uint8)
    return (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


def low_first(packed: Tensor) -> np.ndarray:
    """Codes [..., 2B] of bytes [..., B] whose low nibble comes first."""
    codes = array(packed)
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)


def fields(words: Tensor, bits: int = 4) -> np.ndarray:
    """Values [..., W, 32/bits] of int32 words [..., W]: value i is at bits ``bits * i`` and above."""
    return array(words).view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> np.ndarray:
    codes = low_first(blocks)
    exponents = array(scales).astype(np.int32) - 127
    with np.errstate(over="ignore"):
        return np.ldexp(E2M1[codes], exponents[..., None]).reshape(*codes.shape[:-2], -1)


def decode_nvfp4(packed: Tensor, scale: Tensor, factor: Tensor, divides: bool) -> np.ndarray:
    values = E4M3[array(scale)]
    scales = values / F32(factor.item()) if divides else values * F32(factor.item())
    return E2M1[low_first(packed)] * np.repeat(scales, 16, axis=1)


def decode_integers(codes: np.ndarray, scale: np.ndarray, zero_points: Any, columns: Any) -> np.ndarray:
    """(q - z) * scale of codes [N, K], scales [N, G] and zero points [N, G] or a number.

    Args:
        columns: the size of the groups, or the group of each column.
    """
    if isinstance(columns, int):
        columns = np.arange(codes.shape[1]) // columns
    zeros = zero_points[:, columns] if isinstance(zero_points, np.ndarray) else zero_points
    with np.errstate(over="ignore"):
        return (codes.astype(F32) - F32(zeros)) * scale[:, columns]


def decode_packed(tensors: dict[str, Tensor], shape: tuple[int, int], group: int, bits: int) -> np.ndarray:
    codes = fields(tensors["weight_packed"], bits).reshape(shape[0], -1)[:, : shape[1]]
    zero_points: Any = 1 << bits - 1
    stored = tensors.get("weight_zero_point")
    if stored is not None and stored.dtype == torch.int8:
        zero_points = array(stored).astype(F32) + zero_points
    elif stored is not None:
        words = fields(stored, bits)  # [ceil(N*bits/32), G, 32/bits]
        zero_points = words.transpose(0, 2, 1).reshape(-1, words.shape[1])[: shape[0]].astype(F32)
    return decode_integers(codes, array(tensors["weight_scale"]), zero_points, group)


def decode_int8(tensors: dict[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    """(q - z) * scale of signed codes and zero points."""
    codes, scale = array(tensors["weight"]).astype(F32), tensors["weight_scale"].reshape(-1, 1)
    scale = scale if scale.numel() in (1, shape[0]) else tensors["weight_scale"]
    zero_points = tensors.get("weight_zero_point", torch.zeros(scale.shape, dtype=torch.int8)).view(scale.shape)
    scales, zeros = (np.repeat(array(t), shape[1] // t.shape[1], axis=1) for t in (scale, zero_points))
    return (codes - zeros.astype(F32)) * scales


def float8_values(codes: Tensor) -> np.ndarray:
    """The values of E4M3; those of E5M2 are the upper halves of float16 numbers."""
    if codes.dtype == torch.float8_e5m2:
        return (array(codes).astype(np.uint16) << 8).view(np.float16).astype(F32)
    return E4M3[array(codes)]


def decode_fp8(codes: Tensor, scale: Tensor, tile: tuple[int, int]) -> np.ndarray:
    """Each code times the scale of its tile; those of the last tiles may be missing."""
    scales = array(scale)
    if scale.element_size() == 1:
        scales = np.ldexp(F32(1), scales.astype(np.int32) - 127)
    rows, columns = codes.shape
    scales = scales.reshape(-(-rows // tile[0]), -(-columns // tile[1]))
    scales = np.repeat(np.repeat(scales, tile[0], axis=0), tile[1], axis=1)
    return float8_values(codes) * scales[:rows, :columns]


FP8_SCALES = ("weight_scale_inv", "weight_scale", "scale")


def decode_awq(tensors: dict[str, Tensor], group: int) -> np.ndarray:
    order = np.argsort(AWQ_ORDER)
    codes, zero_points = (fields(tensors[name])[..., order].reshape(len(tensors[name]), -1) for name in AWQ_WORDS)
    return decode_integers(codes.T, array(tensors["scales"]).T, zero_points.T.astype(F32), group)


AWQ_WORDS = ("qweight", "qzeros")


def decode_gptq(tensors: dict[str, Tensor], group: int, version: int, bits: int) -> np.ndarray:
    words = fields(tensors["qweight"], bits)  # [K*bits/32, N, 32/bits]
    codes = words.transpose(0, 2, 1).reshape(-1, words.shape[1])
    stored = fields(tensors["qzeros"], bits).reshape(len(tensors["qzeros"]), -1)
    zero_points = stored + (1 if version == 1 else 0) & 2**bits - 1
    columns = array(tensors["g_idx"]) if "g_idx" in tensors else group
    return decode_integers(codes.T, array(tensors["scales"]).T, zero_points.T.astype(F32), columns)


def decode_mlx(tensors: dict[str, Tensor], group: int, bits: int = 4) -> np.ndarray:
    """q * scale + bias. The codes of a row are a stream of bits, of each code the lowest first."""
    words = tensors["weight"].numpy()
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(len(words), -1, bits)
    codes = (stream.astype(np.int64) << np.arange(bits)).sum(-1).astype(F32)
    scale, bias = (np.repeat(array(tensors[name]), group, axis=1) for name in ("scales", "biases"))
    return codes * scale + bias
