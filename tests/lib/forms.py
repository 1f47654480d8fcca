"""Every form of a packed weight: random weights of each, and their values by an oracle that shares no code with the
package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reference
from qlora_ext.form import Form
from qlora_ext.weight import TENSORS, Weight4bit, weight_of

# A form per format, and one for each way to store scales and offsets that no format here uses.
FORMS = {
    "nf4": Form(),
    "nf4 alone": Form(scales="float32"),
    "fp4": Form("fp4", "nested8"),
    "mxfp4": Form("e2m1", "table8", 32),
    "nvfp4": Form("e2m1", "table8", 16),
    "q4_0": Form("int4", "float16", 32),
    "int4": Form("int4", "bfloat16", 32),
    "iq4_nl": Form("iq4_nl", "float16", 32),
    "q4_1": Form("uint4", "float16", 32, offsets="float16"),
    "q4_k": Form("uint4", "nested_table8", 32, 8, "scaled8"),
    "awq": Form("uint4", "float16", 128, offsets="zero_point8"),
    "float32 zero points": Form("uint4", "float32", 64, offsets="zero_point8"),
    "float32 offsets": Form("uint4", "float32", 64, offsets="float32"),
    "bfloat16 offsets": Form("uint4", "bfloat16", 64, offsets="bfloat16"),
    "made up": Form.of(
        code=[-3, -2, -1.5, -1, -0.7, -0.5, -0.2, 0, 0.2, 0.4, 0.7, 1, 1.4, 2, 2.5, 4], scales="float16"
    ),
}
# The same for codes of more than 4 bits.
WIDE_FORMS = {
    "q5_0": Form("int5", "float16", 32),
    "q5_1": Form("uint5", "float16", 32, offsets="float16"),
    "q5_k": Form("uint5", "nested_table8", 32, 8, "scaled8"),
    "q6_k": Form("int6", "nested_table8", 16, 16),
    "mlx 6 bits": Form("uint6", "bfloat16", 64, offsets="bfloat16"),
    "q8_0": Form("int8", "float16", 32),
    "int8 nested": Form("int8", "nested8", 64),
    "uint8 zero points": Form("uint8", "float16", 128, offsets="zero_point8"),
    "fp8": Form("e4m3", "float32", 128),
    "e5m2": Form("e5m2", "bfloat16", 64),
}
# Of these, one per width and kind of scales, with blocks that divide short rows. And what modules are tested with.
SOME_WIDE = {
    name: dataclasses.replace(WIDE_FORMS[name], block_size=min(32, WIDE_FORMS[name].block_size))
    for name in ("q5_k", "q6_k", "q8_0", "uint8 zero points", "fp8")
}
MODULE_FORMS = FORMS | SOME_WIDE


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if name == "scale_table":  # powers of two, like E8M0, around 1/64
        return torch.ldexp(torch.ones(256), torch.arange(256) % 8 - 10).expand(shape).contiguous()
    if name == "nested_offset":
        return torch.full(shape, 0.02)
    if dtype == torch.uint8:
        return (
            torch.randint(16 if name == "block_offsets" else 256, shape, generator=generator)
            .clamp_max(63 if name == "absmax" else 255)
            .to(dtype)
        )
    t = torch.rand(shape, generator=generator) * 0.01 + 0.005
    return (-t if name == "block_offsets" else t).to(dtype)


def random_weight(
    form: Form, shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Weight4bit:
    """A weight [N, K], or a stack [E, N, K], of random codes with scales and offsets of plausible sizes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in form.tensors(shape[-2:], shape[:-2]).items():
        if name == "packed":
            # Of codes that are floating-point numbers, those below 2^-5 or 2^-8, which are all finite.
            is_float = form.code in ("e4m3", "e5m2")
            t = torch.randint(256, spec.shape, generator=generator).to(spec.dtype) & (0x9F if is_float else 0xFF)
        else:
            t = _random(name, spec.shape, spec.dtype, generator)
        tensors[name] = t.to(device)
    return weight_of(
        form, **{"nested_absmax": None, "nested_offset": None} | tensors, shape=torch.Size(shape), dtype=dtype
    )


def _array(t: Tensor) -> np.ndarray:
    return (t.float() if t.is_floating_point() else t).cpu().numpy()


def code_values(code: str) -> np.ndarray:
    if code.startswith("0x"):
        return np.frombuffer(bytes.fromhex(code[2:]), ">f4").astype(np.float32)
    return (reference.CODES | reference.WIDE_CODES)[code]


def oracle(w4: Weight4bit) -> np.ndarray:
    """The values of a weight [N, K], float32."""
    return decoded(vars(w4), w4.shape.numel()).reshape(w4.shape)


def decoded(weight: dict[str, Any], numel: int) -> np.ndarray:
    """The first ``numel`` values of a weight, float32, from an operator's arguments by name."""
    codes, scales, offsets, zero_points = parts(weight, numel)
    values = code_values(weight.get("code", "nf4"))[codes]
    if zero_points is not None:
        return (values - zero_points) * scales
    return values * scales if offsets is None else values * scales + offsets


def parts(weight: dict[str, Any], numel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Of each of the first ``numel`` elements the code, the scale, the offset, and the zero point that makes it."""
    arrays = {name: _array(weight[name]).reshape(-1) for name in TENSORS if weight.get(name) is not None}
    nested_block = min(weight["nested_block_size"], arrays["absmax"].size + 1)
    nested = np.arange(arrays["absmax"].size) // nested_block
    scales = arrays["absmax"]
    if "scale_table" in arrays:
        scales = arrays["scale_table"][scales]
        scales = scales * arrays["nested_absmax"][nested] if "nested_absmax" in arrays else scales
    elif "nested_offset" in arrays:
        scales = reference.dequantize_absmax(scales, arrays["nested_absmax"], arrays["nested_offset"][0], nested_block)

    def per_element(of_blocks: np.ndarray) -> np.ndarray:
        return np.repeat(of_blocks.astype(np.float32), weight["block_size"])[:numel]

    bits = len(code_values(weight.get("code", "nf4"))).bit_length() - 1
    codes, scales = reference.unpack(arrays["packed"], numel, bits), per_element(scales)
    offsets = arrays.get("block_offsets")
    if offsets is None:
        return codes, scales, None, None
    if offsets.dtype != np.uint8:
        return codes, scales, per_element(offsets), None
    if "offset_scale" not in arrays:
        return codes, scales, -(per_element(offsets) * scales), per_element(offsets)
    return codes, scales, -(per_element(offsets) * per_element(arrays["offset_scale"][nested])), None
