"""Reads and writes the keys, JSON and bytes in which bitsandbytes saves a 4-bit weight.

For a weight named ``prefix``, bitsandbytes saves ``prefix`` (the packed codes, in any storage dtype),
``prefix.absmax``, ``prefix.quant_map`` (the 16 code values), ``prefix.quant_state.bitsandbytes__nf4`` or ``..._fp4``
(JSON as a uint8 tensor) and, with double quantization, ``prefix.nested_absmax`` and ``prefix.nested_quant_map`` (the
256 values of its 8-bit code). This module does not import bitsandbytes.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, formats, ops
from .dtype_names import name_of
from .untrusted import excerpt, parse_json

CODES = (formats.NF4, "fp4")  # the codes that bitsandbytes has
_STATE_PREFIX = "quant_state.bitsandbytes__"
# Every key that may follow a weight's name. They are matched in this order, so longer ones come first.
COMPANIONS = (
    *(_STATE_PREFIX + code for code in CODES),
    "nested_quant_map",
    "nested_absmax",
    "quant_map",
    "absmax",
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_JSON_BYTES = 65536  # bitsandbytes writes about 200


def _code_values(code: str) -> Tensor:
    """The 16 values of a code, float32 on the CPU, whatever torch's default dtype and device."""
    return torch.tensor(formats.code_values(code), dtype=torch.float32, device="cpu")


def _nested_code_values() -> Tensor:
    """The 256 values of the 8-bit code of double-quantized scales, float32 on the CPU."""
    return torch.from_numpy(_C.dynamic8_code())


def _take(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        t = state_dict[name]
    except KeyError:
        raise KeyError(f"{name}: missing from the bitsandbytes state") from None
    if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_meta or t.is_quantized:
        raise ValueError(f"{name}: expected a dense tensor with its values, got {reprlib.repr(t)}")
    return t.detach()


def _take_scales(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    t = _take(state_dict, name).reshape(-1)
    if not t.is_floating_point():
        raise ValueError(f"{name}: expected float32 scales, got {t.dtype}")
    if not bool(((t >= 0) & t.isfinite()).all()):
        raise ValueError(f"{name}: expected finite scales of 0 or more, got negative, infinite or NaN ones")
    return t.float()


def _check_code(name: str, found: Tensor, expected: Tensor) -> None:
    if (
        not found.is_floating_point()
        or found.shape != expected.shape
        or not torch.equal(found.to("cpu", torch.float32), expected)
    ):
        raise ValueError(f"{name}: expected bitsandbytes' own code values, got another table, which is not supported")


def _code_of(state_dict: Mapping[str, Tensor], prefix: str, codes: Sequence[str]) -> str:
    """The code of the weight; the first of ``codes`` if the state does not have it."""
    expected = f"{prefix}: expected a bitsandbytes {' or '.join(code.upper() for code in codes)} weight"
    state = f"{prefix}.{_STATE_PREFIX}"
    kinds = [key.removeprefix(state) for key in state_dict if key.startswith(state)]
    for kind in kinds:
        if kind not in codes:
            raise ValueError(f"{expected}, got {excerpt(kind.upper(), 20)}, not supported")
    if len(kinds) > 1:
        raise ValueError(f"{expected}, got both {' and '.join(kind.upper() for kind in sorted(kinds))}")
    if f"{prefix}.SCB" in state_dict or f"{prefix.rpartition('.')[0]}.SCB" in state_dict:
        raise ValueError(f"{expected}, got int8 (LLM.int8()), which is not supported")
    return kinds[0] if kinds else codes[0]


def _read_state(state_dict: Mapping[str, Tensor], prefix: str, code: str) -> dict[str, Any]:
    name = f"{prefix}.{_STATE_PREFIX}{code}"
    raw = _take(state_dict, name)
    if raw.dtype != torch.uint8 or raw.ndim != 1 or raw.numel() > _MAX_JSON_BYTES:
        raise ValueError(
            f"{name}: expected JSON in a uint8 tensor of one dimension and at most {_MAX_JSON_BYTES} bytes, "
            f"got {raw.dtype} {list(raw.shape)}"
        )
    state = parse_json(bytes(raw.tolist()).decode(errors="replace"), f"{name}: expected JSON in a uint8 tensor")
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(state).__name__}")
    absent = [key for key in ("quant_type", "blocksize", "dtype", "shape") if state.get(key) is None]
    if absent:
        raise ValueError(f"{name}: expected the fields {', '.join(absent)} too, got {reprlib.repr(sorted(state))}")
    if state["quant_type"] != code:
        found = reprlib.repr(state["quant_type"])
        raise ValueError(f"{prefix}: expected quant_type '{code}', got {found}, which is not supported")
    if not isinstance(state["dtype"], str) or state["dtype"] not in _DTYPES:
        found = reprlib.repr(state["dtype"])
        raise ValueError(f"{name}: expected float32, bfloat16 or float16 as dtype, got {found}")
    ops.check_shape(f"{name}: shape", state["shape"])
    return state


def _offset(name: str, value: Any, device: torch.device) -> Tensor:
    """``nested_offset`` as a scalar tensor, as in the packed state."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: expected a finite float32 number as nested_offset, got {reprlib.repr(value)}")
    return torch.tensor(value, dtype=torch.float32, device=device)


def read(state_dict: Mapping[str, Tensor], prefix: str, codes: Sequence[str] = (formats.NF4,)) -> dict[str, Any]:
    """The fields of the weight that bitsandbytes saved under the name ``prefix``; see ``NF4Weight.from_bitsandbytes``.

    The codes may have any storage dtype (``bnb_4bit_quant_storage``), because only their bytes are read. Scales stay on
    their device.

    Args:
        codes: which of ``CODES`` the weight may have.

    Raises:
        KeyError: a key is missing. ValueError: the code is none of these; or the JSON, a dtype, a shape or a value is
            invalid.
    """
    code = _code_of(state_dict, prefix, codes)
    state = _read_state(state_dict, prefix, code)
    shape, block_size = torch.Size(state["shape"]), state["blocksize"]
    nested_block_size = state.get("nested_blocksize", 256)
    formats.check_block_sizes(block_size, nested_block_size)
    _check_code(f"{prefix}.quant_map", _take(state_dict, f"{prefix}.quant_map"), _code_values(code))

    packed = _take(state_dict, prefix).contiguous().reshape(-1).view(torch.uint8)
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    name = f"{prefix}.{_STATE_PREFIX}{code}"
    nested_absmax = nested_offset = None
    if "nested_offset" in state or f"{prefix}.nested_absmax" in state_dict:
        absmax = _take(state_dict, f"{prefix}.absmax").reshape(-1)
        if absmax.dtype != torch.uint8:
            raise ValueError(f"{prefix}.absmax: expected uint8 codes of nested scales, got {absmax.dtype}")
        nested_absmax = _take_scales(state_dict, f"{prefix}.nested_absmax")
        nested_map = _take(state_dict, f"{prefix}.nested_quant_map")
        _check_code(f"{prefix}.nested_quant_map", nested_map, _nested_code_values())
        if "nested_offset" not in state:
            raise ValueError(f"{name}: expected the field nested_offset too, got {reprlib.repr(sorted(state))}")
        nested_offset = _offset(name, state["nested_offset"], absmax.device)
        expected = {"absmax": (absmax, blocks), "nested_absmax": (nested_absmax, -(-blocks // nested_block_size))}
    else:
        absmax = _take_scales(state_dict, f"{prefix}.absmax")
        expected = {"absmax": (absmax, blocks)}
    for kind, (found, count) in {"packed bytes": (packed, (numel + 1) // 2), **expected}.items():
        if found.numel() != count:
            raise ValueError(f"{prefix}: expected {count} {kind} for shape {list(shape)}, got {found.numel()}")
    return {
        "packed": packed.reshape(ops.packed_shape(shape)),
        "absmax": absmax,
        "nested_absmax": nested_absmax,
        "nested_offset": nested_offset,
        "shape": shape,
        "dtype": _DTYPES[state["dtype"]],
        "block_size": block_size,
        "nested_block_size": nested_block_size,
        "code": code,
    }


def write(w4: Any, prefix: str) -> dict[str, Tensor]:
    """The keys and tensors, to the byte, that bitsandbytes saves for a ``Weight4bit`` under the name ``prefix``."""
    state: dict[str, Any] = {
        "quant_type": w4.code,
        "blocksize": w4.block_size,
        "dtype": name_of(w4.dtype),
        "shape": list(w4.shape),
    }
    tensors = {
        prefix: w4.packed.reshape(-1, 1),
        f"{prefix}.absmax": w4.absmax,
        f"{prefix}.quant_map": _code_values(w4.code).to(w4.packed.device, copy=True),
    }
    if w4.double_quant:
        state |= {
            "nested_blocksize": w4.nested_block_size,
            "nested_dtype": "float32",
            "nested_offset": w4.nested_offset.item(),
        }
        tensors[f"{prefix}.nested_absmax"] = w4.nested_absmax
        tensors[f"{prefix}.nested_quant_map"] = _nested_code_values().to(w4.packed.device, copy=True)
    tensors[f"{prefix}.{_STATE_PREFIX}{w4.code}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu"
    )
    return tensors
