"""The default compute dtype of a model, on processors with and without bfloat16 arithmetic."""

from __future__ import annotations

import os

import torch

from . import _C
from .dtype_names import AUTO, dtype_named

# Values of ONEDNN_MAX_CPU_ISA, which limits torch's matmuls, that permit native bfloat16 products.
_ONEDNN_WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "DEFAULT", "ALL")


def native_bfloat16() -> bool:
    """Whether the CPU kernels in use, ours and torch's, have instructions that multiply bfloat16.

    These are AVX512-BF16, AMX and ARM's BF16, which the set with I8MM includes. Without them torch converts each
    bfloat16 value separately: a matmul takes 3 to 8 times as long as in float32 (``docs/benchmarks.md``).
    ``QLORA_CPU_ISA`` and ``ONEDNN_MAX_CPU_ISA`` may rule the instructions out.

    Example:
        >>> import qlora_ext
        >>> qlora_ext.build_info()["native_bfloat16"] in (True, False)
        True
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT")).upper()
    return _C.cpu_isa().endswith(("bf16", "i8mm")) and limit.startswith(_ONEDNN_WITH_BF16)


def gpu_without_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` is a GPU of compute capability 7.5, on which our kernels do not multiply bfloat16."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


def computing_dtype(dtype: torch.dtype, device: torch.device | str | int | None) -> torch.dtype:
    """The compute dtype for weights in ``dtype``, which is ``dtype`` itself except for some bfloat16 weights.

    These compute in float32 on a CPU where bfloat16 is slow, and in float16 on a GPU without bfloat16 arithmetic.

    Args:
        dtype: of the model's weights.
        device: the device that computes; None is the CPU.
    """
    if dtype != torch.bfloat16:
        return dtype
    device = torch.device("cpu" if device is None else device)
    if device.type == "cpu":
        return dtype if native_bfloat16() else torch.float32
    return torch.float16 if gpu_without_bfloat16(device) else dtype


def integer_products() -> bool:
    """Whether the CPU kernels in use multiply bfloat16 as pairs of integers, which takes less time than float32.

    Example:
        >>> from qlora_ext import dtypes
        >>> dtypes.integer_products() in (True, False)
        True
    """
    return "many_tokens_int" in _C.choose("linear_nf4", "bfloat16", 1024, 1024, 1024)


def layers_dtype(dtype: torch.dtype, computing: torch.dtype, device: torch.device | str | int | None) -> torch.dtype:
    """The compute dtype of 4-bit layers in a model that computes in ``computing``, which is usually ``computing``.

    The exception is a model with bfloat16 weights that computes in float32, because the CPU lacks bfloat16 arithmetic.
    If the CPU multiplies bfloat16 as integers, its 4-bit layers compute in bfloat16.

    Args:
        dtype: of the model's weights.
        computing: ``computing_dtype`` of them.
        device: the device that computes; None is the CPU.
    """
    device = torch.device("cpu" if device is None else device)
    replaced = dtype == torch.bfloat16 and computing == torch.float32 and device.type == "cpu"
    return dtype if replaced and integer_products() else computing


def computing_dtype_named(name: str, device: torch.device | str | int | None) -> torch.dtype:
    """The dtype of that name, such as "bf16". "auto" is ``computing_dtype`` of bfloat16 on ``device``.

    Raises:
        ValueError: no dtype has that name.
    """
    dtype = dtype_named(name)
    return computing_dtype(dtype, device) if name == AUTO else dtype
