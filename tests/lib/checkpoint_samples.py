"""Weights in the packed formats of checkpoints, and their values (checkpoint_decoders.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint_decoders import (
    FP8_SCALES,
    decode_awq,
    decode_fp8,
    decode_gptq,
    decode_int8,
    decode_mlx,
    decode_mxfp4,
    decode_nvfp4,
    decode_packed,
)
from qlora_ext.checkpoints import Format, Settings, formats_of
from reference import F32


@dataclasses.dataclass
class Sample:
    """A weight of a checkpoint: its tensors, the checkpoint's quantization_config, and the tiles of FP8 weights."""

    config: dict[str, Any]
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    tile: tuple[int, int] = (0, 0)

    @property
    def values(self) -> np.ndarray:
        """The float32 values by the format's formula."""
        return decode(self)


def kind_of(sample: Sample) -> tuple[Format, Settings]:
    """The format that has the tensors of a sample, among those of its checkpoint, and what is known of the scales."""
    for kind, settings in formats_of(sample.config):
        required = {name for name, is_required in kind.tensors(settings).items() if is_required}
        is_int8 = sample.tensors.get("weight", torch.empty(0)).dtype == torch.int8
        if required <= sample.tensors.keys() and ("I8" in kind.code_dtypes or not is_int8):
            scale = next((t for name, t in sample.tensors.items() if name in (*FP8_SCALES, "scales")), None)
            if scale is not None and scale.dtype != torch.float8_e4m3fn:
                settings = dataclasses.replace(settings, scale_dtype=scale.dtype, scale_shape=tuple(scale.shape))
            return kind, settings
    raise AssertionError(sample.config)


def decode(sample: Sample) -> np.ndarray:
    config, tensors, shape = sample.config, sample.tensors, sample.shape
    size = config.get("group_size")
    match config["quant_method"], config.get("format"):
        case "mxfp4", _:
            values = decode_mxfp4(tensors["blocks"], tensors["scales"])
        case _, "mxfp4-pack-quantized":
            values = decode_mxfp4(tensors["weight_packed"].reshape(shape[0], -1, 16), tensors["weight_scale"])
        case _, "nvfp4-pack-quantized":
            parts = (tensors[name] for name in ("weight_packed", "weight_scale", "weight_global_scale"))
            values = decode_nvfp4(*parts, divides=True)
        case _, "pack-quantized":
            weights = config["config_groups"]["group_0"]["weights"]
            values = decode_packed(tensors, shape, weights["group_size"] or shape[1], weights["num_bits"])
        case _, "int-quantized":
            values = decode_int8(tensors, shape)
        case _, "float-quantized" | "mxfp8-quantized":
            values = decode_fp8(tensors["weight"], tensors["weight_scale"], sample.tile)
        case "fp8", _ if "scale" in tensors and tensors["weight"].dtype == torch.int8:
            values = decode_mxfp4(tensors["weight"].view(torch.uint8).reshape(shape[0], -1, 16), tensors["scale"])
        case "fp8", _:
            values = decode_fp8(
                tensors["weight"], next(tensors[name] for name in FP8_SCALES if name in tensors), sample.tile
            )
        case "modelopt", _ if config["quant_algo"].startswith("FP8"):
            values = decode_fp8(tensors["weight"], tensors["weight_scale"], sample.tile)
        case "modelopt", _:
            values = decode_nvfp4(
                *(tensors[name] for name in ("weight", "weight_scale", "weight_scale_2")), divides=False
            )
        case "awq", _:
            values = decode_awq(tensors, shape[1] if size == -1 else size)
        case "auto-round", _ if config["packing_format"] == "auto_round:auto_awq":
            values = decode_awq(tensors, shape[1] if size == -1 else size)
        case "mlx", _:
            values = decode_mlx(tensors, size, config["bits"])
        case (("gptq" | "auto-round"), _):
            version = 1 if config.get("checkpoint_format", "gptq") == "gptq" else 2
            values = decode_gptq(tensors, shape[1] if size == -1 else size, version, config["bits"])
    return values.astype(F32)


def random_bytes(*shape: int, most: int = 255) -> Tensor:
    return torch.randint(0, most + 1, shape, dtype=torch.int64).to(torch.uint8)


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def random_scales(dtype: torch.dtype, *shape: int, positive: bool = False) -> Tensor:
    """Scales of several magnitudes. Those in float32 have the precision of float16."""
    magnitudes = torch.tensor([1e-3, 0.1, 30.0])[torch.randint(0, 3, shape)]
    scale = ((torch.rand(shape, dtype=torch.float32) + 0.01) * magnitudes).half()
    if not positive:
        scale.view(-1)[:2] = torch.tensor([-0.5, 0.0], dtype=torch.float16)[: scale.numel()]
    return scale.to(dtype)


def words_along_rows(values: np.ndarray, bits: int = 4) -> Tensor:
    """int32 [R, ceil(C*bits/32)] of values [R, C]: element i of a word at bits ``bits * i``, padded with 0."""
    per_word = 32 // bits
    padded = np.pad(values.astype(np.int64), ((0, 0), (0, -values.shape[1] % per_word)))
    padded = padded.reshape(len(values), -1, per_word)
    words = sum(padded[..., i] << bits * i for i in range(per_word))
    return torch.from_numpy(np.ascontiguousarray(words.astype(np.uint32).view(np.int32)))


def e4m3_scales(*shape: int) -> Tensor:
    codes = random_bytes(*shape)
    return torch.where((codes & 127) == 127, codes - 1, codes).view(torch.float8_e4m3fn)


def mxfp4(shape: tuple[int, ...] = (3, 6, 96)) -> Sample:
    tensors = {
        "blocks": random_bytes(*shape[:-1], shape[-1] // 32, 16),
        "scales": random_bytes(*shape[:-1], shape[-1] // 32, most=254),
    }
    tensors["scales"].view(-1)[:3] = torch.tensor([0, 127, 254], dtype=torch.uint8)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return Sample(config, shape, tensors)


def compressed_config(name: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def compressed_mxfp4(shape: tuple[int, int] = (6, 96)) -> Sample:
    rows, columns = shape
    tensors = {
        "weight_packed": random_bytes(rows, columns // 2),
        "weight_scale": random_bytes(rows, columns // 32, most=254),
    }
    config = compressed_config("mxfp4-pack-quantized", type="float", strategy="group", group_size=32)
    return Sample(config, shape, tensors)


def compressed_nvfp4(shape: tuple[int, int] = (6, 80)) -> Sample:
    rows, columns = shape
    tensors = {
        "weight_packed": random_bytes(rows, columns // 2),
        "weight_scale": e4m3_scales(rows, columns // 16),
        "weight_global_scale": torch.tensor([3157.7]),
        "input_global_scale": torch.tensor([0.3]),
    }
    config = compressed_config("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    return Sample(config, shape, tensors)


def packed(
    shape: tuple[int, int] = (12, 192),
    group: int | None = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    bits: int = 4,
    **extra: Tensor,
) -> Sample:
    rows, columns = shape
    groups = 1 if group is None else columns // group
    tensors = {
        "weight_packed": random_words(rows, columns * bits // 32),
        "weight_scale": random_scales(dtype, rows, groups, positive=not symmetric),
        "weight_shape": torch.tensor(shape),
        **extra,
    }
    if not symmetric:
        zero_points = random_bytes(rows, groups, most=2**bits - 1).numpy()
        tensors["weight_zero_point"] = words_along_rows(zero_points.T, bits).t().contiguous()
    weights = {"num_bits": bits, "type": "int", "strategy": "channel" if group is None else "group"}
    config = compressed_config("pack-quantized", **weights, group_size=group, symmetric=symmetric)
    return Sample(config, shape, tensors)


def int8(
    shape: tuple[int, int] = (6, 96),
    strategy: str = "channel",
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Sample:
    scales = {"channel": (shape[0], 1), "tensor": (1,), "group": (shape[0], shape[1] // 32)}[strategy]
    tensors = {
        "weight": random_bytes(*shape).view(torch.int8),
        "weight_scale": random_scales(dtype, *scales, positive=not symmetric),
        "input_scale": torch.tensor([0.3]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = random_bytes(*scales).view(torch.int8)
    size = 32 if strategy == "group" else None
    weights = {"num_bits": 8, "type": "int", "strategy": strategy, "group_size": size, "symmetric": symmetric}
    return Sample(compressed_config("int-quantized", **weights), shape, tensors)


def float8_codes(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Codes of numbers."""
    codes, end = random_bytes(*shape), 0x7F if dtype == torch.float8_e4m3fn else 0x7C
    return torch.where((codes & 127) >= end, codes & 0x83, codes).view(dtype)


def e8m0_scales(*shape: int) -> Tensor:
    return random_bytes(*shape, most=240).view(torch.float8_e8m0fnu)


def fp8(
    shape: tuple[int, int] = (140, 320),
    tile: tuple[int, int] | None = (128, 128),
    dtype: torch.dtype = torch.float32,
    codes: torch.dtype = torch.float8_e4m3fn,
    name: str = "weight_scale_inv",
) -> Sample:
    """Weights of DeepSeek-V3 and others in tiles, the last of which may be smaller, or with one scale."""
    rows, columns = shape
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": tile}
    grid = () if tile is None else (-(-rows // tile[0]), -(-columns // tile[1]))
    scale = e8m0_scales(*grid) if dtype == torch.float8_e8m0fnu else random_scales(dtype, *grid, positive=True)
    tensors = {"weight": float8_codes(*shape, dtype=codes), name: scale}
    if tile is None:
        config["activation_scheme"] = "static"
        tensors["activation_scale"] = torch.tensor(0.25)
    if codes == torch.float8_e5m2:
        config["fmt"] = "e5m2"
    return Sample({**config, "weight_block_size": None if tile is None else list(tile)}, shape, tensors, tile or shape)


def deepseek_fp4(shape: tuple[int, int] = (6, 96)) -> Sample:
    """An expert of DeepSeek-V4, whose other weights are in FP8."""
    rows, columns = shape
    config = fp8().config | {"expert_dtype": "fp4", "scale_fmt": "ue8m0"}
    scale = e8m0_scales(rows, columns // 32)
    return Sample(config, shape, {"weight": random_bytes(rows, columns // 2).view(torch.int8), "scale": scale})


def float_quantized(
    shape: tuple[int, int] = (6, 96), strategy: str = "channel", dtype: torch.dtype = torch.bfloat16
) -> Sample:
    rows, columns = shape
    tile = {"channel": (1, columns), "tensor": shape, "group": (1, 32), "block": (128, 128)}[strategy]
    grid = (1,) if strategy == "tensor" else (-(-rows // tile[0]), -(-columns // tile[1]))
    tensors = {
        "weight": float8_codes(*shape),
        "weight_scale": random_scales(dtype, *grid),
        "input_scale": torch.tensor([0.3]),
    }
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    weights |= {"group": {"group_size": 32}, "block": {"block_structure": [128, 128]}}.get(strategy, {})
    return Sample(compressed_config("float-quantized", **weights), shape, tensors, tile)


def mxfp8(shape: tuple[int, int] = (6, 96)) -> Sample:
    scale = e8m0_scales(shape[0], shape[1] // 32).view(torch.uint8)
    config = compressed_config("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32)
    return Sample(config, shape, {"weight": float8_codes(*shape), "weight_scale": scale}, (1, 32))


def unpacked_zero_points(sample: Sample) -> Sample:
    """``sample`` with zero points as compressed-tensors stored them before version 0.10."""
    rows, groups = sample.tensors["weight_scale"].shape
    sample.tensors["weight_zero_point"] = torch.randint(-8, 8, (rows, groups), dtype=torch.int8)
    return sample


def modelopt(shape: tuple[int, int] = (6, 80)) -> Sample:
    rows, columns = shape
    tensors = {
        "weight": random_bytes(rows, columns // 2),
        "weight_scale": e4m3_scales(rows, columns // 16),
        "weight_scale_2": torch.tensor(3.7e-4),
        "input_scale": torch.tensor(0.01),
    }
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.0.self_attn*"]}
    return Sample(config, shape, tensors)


def modelopt_fp8(shape: tuple[int, int] = (6, 80), rows: bool = False) -> Sample:
    scale = random_scales(torch.float32, shape[0], positive=True) if rows else torch.tensor(0.0017)
    tensors = {"weight": float8_codes(*shape), "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN" if rows else "FP8"}
    return Sample(config, shape, tensors, (1, shape[1]) if rows else shape)


def awq(shape: tuple[int, int] = (24, 256), group: int = 128, dtype: torch.dtype = torch.float16) -> Sample:
    rows, columns = shape
    groups = 1 if group == -1 else columns // group
    tensors = {
        "qweight": random_words(columns, rows // 8),
        "qzeros": random_words(groups, rows // 8),
        "scales": random_scales(dtype, groups, rows, positive=True),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Sample(config, shape, tensors)


def gptq(
    shape: tuple[int, int] = (24, 256),
    group: int = 128,
    symmetric: bool = True,
    version: int = 1,
    order: bool = True,
    desc_act: bool = False,
    bits: int = 4,
) -> Sample:
    rows, columns = shape
    size = columns if group == -1 else group
    groups = -(-columns // size)
    bias = 1 if version == 1 else 0
    stored = np.full((groups, rows), 2 ** (bits - 1) - bias)
    if not symmetric:
        stored = random_bytes(groups, rows, most=2**bits - 1).numpy()
    tensors = {
        "qweight": random_words(columns * bits // 32, rows),
        "qzeros": words_along_rows(stored, bits),
        "scales": random_scales(torch.float16, groups, rows, positive=not symmetric),
    }
    if order:
        tensors["g_idx"] = torch.arange(columns, dtype=torch.int32) // size
        if desc_act:
            tensors["g_idx"] = tensors["g_idx"][torch.randperm(columns)]
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": desc_act,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Sample(config, shape, tensors)


def auto_round(packed: Sample) -> Sample:
    """A weight of AutoGPTQ or AutoAWQ, in a checkpoint of AutoRound."""
    config = {
        "quant_method": "auto-round",
        "packing_format": f"auto_round:auto_{packed.config['quant_method']}",
        "bits": 4,
        "group_size": packed.config["group_size"],
        "data_type": "int",
        "sym": packed.config.get("sym", False),
        "autoround_version": "0.9.1",
        "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
    }
    return dataclasses.replace(packed, config=config)


def mlx(
    shape: tuple[int, int] = (24, 256), group: int = 64, dtype: torch.dtype = torch.bfloat16, bits: int = 4
) -> Sample:
    rows, columns = shape
    tensors = {
        "weight": random_words(rows, columns * bits // 32).view(torch.uint32),
        "scales": random_scales(dtype, rows, columns // group),
        "biases": random_scales(dtype, rows, columns // group),
    }
    return Sample({"quant_method": "mlx", "group_size": group, "bits": bits}, shape, tensors)


# One weight of each kind, by a name for the test's report.
SAMPLES: dict[str, Callable[[], Sample]] = {
    "mxfp4": mxfp4,
    "mxfp4-matrix": lambda: mxfp4((5, 32)),
    "compressed-mxfp4": compressed_mxfp4,
    "compressed-nvfp4": compressed_nvfp4,
    "compressed-nvfp4-row": lambda: compressed_nvfp4((1, 16)),
    "packed": packed,
    "packed-128-half": lambda: packed((5, 384), 128, dtype=torch.float16),
    "packed-float32": lambda: packed(dtype=torch.float32),
    "packed-channel": lambda: packed((5, 176), None),
    "packed-group-48": lambda: packed((5, 192), 48),
    "packed-order": lambda: packed(weight_g_idx=torch.arange(192) // 32),
    "packed-no-order": lambda: packed(weight_g_idx=torch.full((192,), -1, dtype=torch.int32)),
    "packed-zero-points": lambda: packed((13, 192), symmetric=False),
    "packed-zero-points-channel": lambda: packed((16, 96), None, symmetric=False),
    "packed-zero-points-unpacked": lambda: unpacked_zero_points(packed((12, 96), symmetric=False)),
    "packed-zero-points-float32": lambda: packed((3, 192), 64, symmetric=False, dtype=torch.float32),
    "modelopt": modelopt,
    "awq": awq,
    "awq-32": lambda: awq((8, 96), 32),
    "awq-channel": lambda: awq((264, 48), -1),
    "awq-bfloat16": lambda: awq(dtype=torch.bfloat16),
    "gptq": gptq,
    "gptq-v2": lambda: gptq(version=2),
    "gptq-zero-points": lambda: gptq(symmetric=False),
    "gptq-zero-points-v2": lambda: gptq((8, 64), 32, symmetric=False, version=2),
    "gptq-short-last-group": lambda: gptq((16, 320), 128, symmetric=False),
    "gptq-channel": lambda: gptq((16, 80), -1, symmetric=False, order=False),
    "gptq-order": lambda: gptq(desc_act=True),
    "gptq-order-zero-points": lambda: gptq((16, 320), 128, symmetric=False, desc_act=True),
    "auto-round": lambda: auto_round(gptq()),
    "auto-round-awq": lambda: auto_round(awq()),
    "fp8": fp8,
    "fp8-one-tile": lambda: fp8((16, 64)),
    "fp8-bfloat16": lambda: fp8((5, 128), (4, 64), torch.bfloat16),
    "fp8-e8m0": lambda: fp8(dtype=torch.float8_e8m0fnu),
    "fp8-tensor": lambda: fp8((6, 96), None),
    "fp8-e5m2": lambda: fp8(codes=torch.float8_e5m2),
    "fp8-weight-scale": lambda: fp8((6, 96), None, name="weight_scale"),
    "fp8-scale": lambda: fp8(dtype=torch.float8_e8m0fnu, name="scale"),
    "fp8-experts": deepseek_fp4,
    "float-channel": float_quantized,
    "float-tensor": lambda: float_quantized(strategy="tensor"),
    "float-group": lambda: float_quantized(strategy="group", dtype=torch.float16),
    "float-block": lambda: float_quantized((130, 208), "block"),
    "mxfp8": mxfp8,
    "modelopt-fp8": modelopt_fp8,
    "int8-channel": int8,
    "int8-tensor": lambda: int8(strategy="tensor"),
    "int8-group": lambda: int8(strategy="group", dtype=torch.float32),
    "int8-zero-points": lambda: int8(symmetric=False),
    "int8-tensor-zero-points": lambda: int8(strategy="tensor", symmetric=False),
    "int8-group-zero-points": lambda: int8(strategy="group", symmetric=False, dtype=torch.float16),
    "packed-8-bits": lambda: packed(bits=8),
    "packed-8-bits-zero-points": lambda: packed((13, 192), symmetric=False, bits=8),
    "gptq-8-bits": lambda: gptq(bits=8),
    "gptq-8-bits-order": lambda: gptq((16, 320), 128, symmetric=False, desc_act=True, bits=8),
    "mlx-5-bits": lambda: mlx(bits=5),
    "mlx-6-bits": lambda: mlx((13, 96), 32, bits=6),
    "mlx-8-bits": lambda: mlx(dtype=torch.float16, bits=8),
    "mlx": mlx,
    "mlx-32-half": lambda: mlx((13, 96), 32, torch.float16),
    "mlx-128-float32": lambda: mlx((1, 384), 128, torch.float32),
}
