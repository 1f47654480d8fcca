"""Packed weights, and the functions that quantize tensors to them and decode them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import encoders
from .form import Form
from .weight_tensor import TENSORS as TENSORS
from .weight_tensor import NF4Weight as NF4Weight
from .weight_tensor import Weight4bit as Weight4bit
from .weight_tensor import operands as operands
from .weight_tensor import weight_of as weight_of


def has_values(t: Tensor) -> bool:
    """Whether ``t`` has values to read: not on the meta device, in fake tensor mode or while a graph is traced."""
    return not (t.is_meta or isinstance(t, FakeTensor) or torch.compiler.is_compiling())


def _refuse_non_finite(w: Tensor, w4: Weight4bit) -> None:
    told = [t for name, t in w4.tensors.items() if t.is_floating_point() and name != "scale_table"]
    if w4.scale_table is not None:  # scales from a table are finite
        told.append(w)
    if all(bool(t.isfinite().all()) for t in told):
        return
    bad = (~w.isfinite()).reshape(-1).nonzero()
    if bad.numel() == 0:
        raise ValueError(
            f"w: expected values whose scales are finite in {w4.form.scales}, got magnitudes up to {w.abs().max():g}"
        )
    where = tuple(map(int, np.unravel_index(int(bad[0]), w.shape)))
    blocks, bad_blocks = -(-w.numel() // w4.block_size), (bad // w4.block_size).unique().numel()
    raise ValueError(
        f"w: expected finite values, got {w[where].item()} at index {list(where)} "
        f"({bad_blocks} of {blocks} blocks hold NaN or infinity)"
    )


def quantize_nf4(w: Tensor, block_size: int = 64, double_quant: bool = True, nested_block_size: int = 256) -> NF4Weight:
    """Quantizes a tensor to 4-bit NormalFloat (QLoRA, Dettmers et al., 2023), bit-compatible with bitsandbytes.

    Args:
        w: a tensor of any shape, float32, bfloat16 or float16, on the CPU or on CUDA, with finite values.
        block_size: elements per scale: a power of two from 16 to 4096.
        double_quant: store the scales in 8 bits, in blocks of ``nested_block_size``.
        nested_block_size: scales per nested scale: from 1 to 2^20; bitsandbytes uses 256.

    Returns:
        The weight, on the device of ``w``. In a compiled graph, NaN and infinity are not rejected: their block decodes
        to NaN.

    Raises:
        TypeError: ``w`` is not a tensor of one of these dtypes. ValueError: a block size is out of range, or ``w`` has
            a NaN or an infinity; the message gives its index.

    Example:
        >>> w4 = qlora_ext.quantize_nf4(torch.randn(48, 64))
        >>> w4.packed.shape, w4.packed.dtype
        (torch.Size([48, 32]), torch.uint8)
        >>> qlora_ext.quantize_nf4(torch.tensor([1.0, float("nan")]))
        Traceback (most recent call last):
        ValueError: w: expected finite values, got nan at index [1] (1 of 1 blocks hold NaN or infinity)
    """
    w4 = quantize(w, Form.of(block_size=block_size, double_quant=double_quant, nested_block_size=nested_block_size))
    assert isinstance(w4, NF4Weight)
    return w4


def quantize(w: Tensor, form: Form | str = "nf4") -> Weight4bit:
    """Quantizes a tensor to a format by the format's own recipe.

    The names of formats, their values, the elements per scale, the bits per element, and how scales are computed::

        nf4     NF4        64  4.13  as in quantize_nf4 (bitsandbytes)
        fp4     FP4        64  4.13  the same (bitsandbytes)
        mxfp4   E2M1       32  4.25  a power of two (OCP Microscaling Formats 1.0)
        nvfp4   E2M1       16  4.5   E4M3, with a factor for the tensor (compressed-tensors)
        int4    -8..7      32  4.5   bfloat16: the largest magnitude is 7.5 (compressed-tensors)
        q4_0    -8..7      32  4.5   float16: the element of the largest magnitude is -8 (ggml)
        q4_1    0..15      32  5     float16, and an offset: the least element is 0, the largest is 15 (ggml)
        q4_k    0..15      32  4.5   6 bits times float16, and an offset, with the least weighted error (ggml)
        iq4_nl  IQ4_NL     32  4.5   float16, with the least error for its codes (ggml, without its search)
        iq4_xs  IQ4_NL     32  4.25  6 bits times float16, with the least weighted error (ggml)
        q5_0    -16..15    32  5.5   as q4_0, with -16 (ggml)
        q5_1    0..31      32  6     as q4_1, with 31 (ggml)
        q5_k    0..31      32  5.5   as q4_k (ggml)
        q6_k    -32..31    16  6.56  8 bits times float16, with the least weighted error (ggml)
        q8_0    -128..127  32  8.5   float16: the largest magnitude is 127 (ggml)
        int8    -128..127 128  8.13  bfloat16: the largest magnitude is 127.5 (compressed-tensors)
        fp8     E4M3      128  8.25  float32: the largest magnitude is 448

    Formats of more than 4 bits need rows of whole blocks (``Form.row_unit``).

    Args:
        w: as in ``quantize_nf4``.
        form: one of these names, or a ``Form``, for example one of these with another block size:
            ``qlora_ext.Form("int4", "bfloat16", block_size=128)``.

    Returns:
        The weight, on the device of ``w``.

    Raises:
        TypeError: ``w`` is not a tensor of one of these dtypes. ValueError: there is no recipe for the form; or ``w``
            has rows that the form does not have, a NaN or an infinity (the message gives its index), or values that are
            too large for the scales.

    Example:
        >>> w4 = qlora_ext.quantize(torch.randn(48, 64), "mxfp4")
        >>> w4.form.code, w4.block_size, w4.absmax.dtype, w4.bits_per_param > 4.25
        ('e2m1', 32, torch.uint8, True)
        >>> qlora_ext.quantize(torch.randn(48, 64), "q8_0").bits_per_param
        8.5
    """
    if isinstance(form, str):
        form = Form.named(form)
    if not isinstance(w, Tensor):
        raise TypeError(f"w: expected a torch.Tensor, got {type(w).__name__}")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"w: expected float32, bfloat16 or float16, got {w.dtype}")
    w = w.detach()
    form.check_rows("w", w.shape)
    w4 = weight_of(form, **encoders.tensors_of(w, form), shape=w.shape, dtype=w.dtype)
    if has_values(w4.packed):
        _refuse_non_finite(w, w4)
    return w4


def dequantize_nf4(w4: Weight4bit, dtype: torch.dtype | None = None) -> Tensor:
    """The decoded tensor, of shape ``w4.shape``, rounded once from float32. The same as ``w4.dequantize(dtype)``.

    Args:
        dtype: float64, float32, bfloat16 or float16. None is the dtype of the tensor that was quantized.

    Raises:
        TypeError: ``w4`` is not a 4-bit weight. ValueError: ``dtype`` is none of these.

    Example:
        >>> w = torch.randn(48, 64)
        >>> decoded = qlora_ext.dequantize_nf4(qlora_ext.quantize_nf4(w))
        >>> decoded.dtype, bool((decoded - w).norm() < 0.12 * w.norm())
        (torch.float32, True)
    """
    if not isinstance(w4, Weight4bit):
        raise TypeError(f"w4: expected an NF4Weight, got {type(w4).__name__}")
    return w4.dequantize(dtype)
