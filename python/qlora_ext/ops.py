"""Shapes (fake kernels) and autocast of ``torch.ops.qlora.*``. Gradients are in ``autograd.py``.

The operators' signatures are in ``cpp/ops/schema.cpp``. Arguments at two places describe a packed weight
(``Weight4bit.operands``). Those at the end have defaults, which are those of NF4.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import LIBRARY, OPERATORS
from ._library import link_compiled_code as link_compiled_code
from .arguments import arguments_of
from .formats import EXACT, MAX_ELEMENTS, NF4, check_activations, check_block_sizes, check_code, is_integer

# Named tuples of the operators' arguments. An omitted argument takes the schema's default.
given_linear_nf4 = arguments_of(torch.ops.qlora.linear_nf4.default, defaults=True)
MERGE_LORA_NF4 = arguments_of(torch.ops.qlora.merge_lora_nf4.default, defaults=True)


def check_shape(name: str, shape: Any) -> None:
    """Raises a ValueError unless ``shape`` is a list of sizes with at most ``MAX_ELEMENTS`` elements."""
    if not isinstance(shape, Sequence) or not all(is_integer(size) and size >= 0 for size in shape):
        raise ValueError(f"{name}: expected a list of integers of 0 or more, got {reprlib.repr(shape)}")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise ValueError(f"{name}: expected at most 2^48 elements, got {reprlib.repr(list(shape))}")


def check_lora_numbers(scaling: float, dropout_p: float) -> None:
    """Raises a ValueError unless ``scaling`` is finite in float32 and ``dropout_p`` is a probability."""
    if not abs(scaling) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scaling: expected a finite number within float32's range, got {scaling}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")


def check_seed_tensor(seed_tensor: Tensor | None) -> None:
    """Raises a ValueError unless ``seed_tensor`` is None or a 0-dim int64 tensor."""
    if seed_tensor is not None and (seed_tensor.dtype != torch.int64 or seed_tensor.ndim != 0):
        raise ValueError(
            f"seed_tensor: expected a 0-dim int64 tensor, got {seed_tensor.dtype} of shape {list(seed_tensor.shape)}"
        )


def packed_shape(shape: torch.Size | tuple[int, ...], bits: int = 4) -> tuple[int, ...]:
    """The shape of a tensor's packed codes: [..., K * bits / 8], or one dimension if a row ends within a byte."""
    if len(shape) >= 1 and shape[-1] * bits % 8 == 0:
        return (*shape[:-1], shape[-1] * bits // 8)
    return ((math.prod(shape) * bits + 7) // 8,)


def _refuse_onnx() -> None:
    """Rejects a graph that is traced for ONNX, which has no operator for packed weights.

    Raises:
        ValueError: ``torch.onnx.export`` is tracing.
    """
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise ValueError(
            "model: ONNX export of 4-bit layers is not supported; export the dense model, which you get from "
            "merge_and_unload() of a PEFT model, or dequantize() of a transformers model"
        )


def check_one_device(operator: str, *args: Any) -> None:
    """Rejects tensors on different devices, as the kernels do.

    If any tensor is on the meta device, torch runs the fake kernel. Without this check, a call that mixes meta and real
    tensors would return uninitialized memory.

    Raises:
        ValueError: two tensors are on different devices.
    """
    names = [a.name for a in getattr(torch.ops.qlora, operator).default._schema.arguments]
    devices = {name: a.device for name, a in zip(names, args, strict=False) if isinstance(a, Tensor)}
    first, *others = devices
    for name in others:
        if devices[name] != devices[first]:
            raise ValueError(f"{name}: expected on the device of {first} ({devices[first]}), got {devices[name]}")


def register_fake(name: str) -> Callable[[Any], Any]:
    """Registers the decorated function as an operator's fake kernel, after the checks that operators share.

    It gets the named tuple of the operator's arguments.
    """
    named = arguments_of(getattr(torch.ops.qlora, name).default, defaults=True)

    def register(outputs_of: Callable[[Any], Any]) -> Any:
        def fake(*args: Any) -> Any:
            a = named(*args)
            if hasattr(a, "packed"):
                _refuse_onnx()
            check_block_sizes(getattr(a, "block_size", 64), getattr(a, "nested_block_size", 256))
            check_code(getattr(a, "code", NF4))
            check_activations(getattr(a, "activations", EXACT))
            check_lora_numbers(getattr(a, "scaling", 1.0), getattr(a, "dropout_p", 0.0))
            check_seed_tensor(getattr(a, "seed_tensor", None))
            check_one_device(name, *args)
            return outputs_of(a)

        torch.library.register_fake(f"qlora::{name}", fake)
        return outputs_of

    return register


def _count(elements: int, size: int) -> tuple[int]:
    """The shape of the scales of blocks of that size."""
    return (-(-elements // size),)


@register_fake("quantize_nf4")
def _(a: Any) -> tuple[Tensor, Tensor]:
    scales = a.w.new_empty(_count(a.w.numel(), a.block_size), dtype=torch.float32)
    return a.w.new_empty(packed_shape(a.w.shape), dtype=torch.uint8), scales


@register_fake("search_absmax_nf4")
def _(a: Any) -> Any:
    return a.w.new_empty(_count(a.w.numel(), a.block_size), dtype=torch.float32)


@register_fake("encode_nf4")
@register_fake("encode_nf4_stochastic")
def _(a: Any) -> Any:
    return a.w.new_empty(packed_shape(a.w.shape), dtype=torch.uint8)


@register_fake("merge_lora_nf4")
def _(a: Any) -> Any:
    return a.packed.new_empty(a.packed.shape)


@register_fake("quantize_absmax")
def _(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    codes = a.absmax.new_empty((a.absmax.numel(),), dtype=torch.uint8)
    return codes, a.absmax.new_empty(_count(a.absmax.numel(), a.nested_block_size)), a.absmax.new_empty(())


@register_fake("dequantize_absmax")
def _(a: Any) -> Any:
    return a.codes.new_empty((a.codes.numel(),), dtype=torch.float32)


@register_fake("dequantize_nf4")
def _(a: Any) -> Any:
    return a.packed.new_empty(a.shape, dtype=a.dtype)


def _max_rank(a: Any) -> int | None:
    """The ``max_rank`` of a call with several adapters, None if it has one.

    Raises:
        ValueError: one of their tensors has the wrong dtype.
    """
    if a.adapter_of_row is None:
        return None
    for name, dtypes in (
        ("adapter_of_row", (torch.int32,)),
        ("rank_offsets", (torch.int32,)),
        ("scalings", (torch.float32, torch.float64)),
        ("seeds", (torch.int64,)),
    ):
        tensor = getattr(a, name)
        if tensor is None and name != "seeds":
            raise ValueError(f"{name}: expected a tensor with adapter_of_row, got None")
        if tensor is not None and tensor.dtype not in dtypes:
            raise ValueError(f"{name}: expected {dtypes[-1]}, got {tensor.dtype}")
    max_rank: int = a.max_rank
    return max_rank


def _register_fake_linear(name: str) -> None:
    """Registers the fake kernel of a linear operator or one of its gradients, over a single weight or over experts."""

    @register_fake(name)
    def _(a: Any) -> Any:
        max_rank = _max_rank(a)
        if name.endswith("_dlora"):
            return a.lora_a.new_empty(a.lora_a.shape), a.lora_b.new_empty(a.lora_b.shape)
        tokens, features = (a.dy, a.in_features) if "_dx" in name else (a.x, a.out_features)
        out = tokens.new_empty((*tokens.shape[:-1], features))
        if "_with_" not in name:
            return out
        if a.lora_a is None:
            raise ValueError("lora_a: expected a tensor, got None")
        rank = a.lora_a.shape[-2] if max_rank is None else max_rank
        return out, tokens.new_empty((*tokens.shape[:-1], rank))


for _name in OPERATORS:
    if "linear_nf4" in _name:
        _register_fake_linear(_name)


# The dense arguments of linear_nf4, which autocast casts.
_DENSE = ("x", "bias", "lora_a", "lora_b")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The autocast dtype for devices of that type; None if autocast is off, or the type has none."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch raises if asked about meta
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_linear_nf4_args(device_type: str, args: Sequence[Any]) -> list[Any]:
    """The arguments of ``linear_nf4`` under autocast: x, bias and adapters are cast, unless they are float64."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(name: str, value: Any) -> Any:
        if name in _DENSE and value is not None and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(dtype)
        return value

    return [cast(name, value) for name, value in given_linear_nf4(*args)._asdict().items()]


def _autocast(device_type: str) -> None:
    def linear_nf4(*args: Any) -> Tensor:
        cast = autocast_linear_nf4_args(device_type, args)
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
            torch._C.DispatchKey.AutocastCUDA
        )
        with torch._C._ExcludeDispatchKeyGuard(keys):
            y: Tensor = torch.ops.qlora.linear_nf4(*cast)
        return y

    LIBRARY.impl("linear_nf4", linear_nf4, f"Autocast{device_type.upper()}")


_autocast("cpu")
_autocast("cuda")
