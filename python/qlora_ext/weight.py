"""``Weight4bit``: a frozen tensor stored as 4-bit codes and scales. ``NF4Weight`` is the one whose code is NF4."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import bitsandbytes_format, formats, recipes
from ._internal.dtype_names import name_of
from ._internal.loans import PackedTensors
from .form import Form
from .no_arithmetic import NoArithmetic

Self = TypeVar("Self", bound="Weight4bit")


# The names of a weight's tensors.
TENSORS: tuple[str, ...] = PackedTensors._fields


@dataclasses.dataclass(frozen=True, eq=False)
class Weight4bit(NoArithmetic):
    """A tensor with 4 bits per element. Each element is a value of the code times the scale of its block.

    Attributes:
        packed: uint8 [..., K/2]: element 2i is in the high nibble of byte i, element 2i+1 in the low nibble.
        absmax: the scales [blocks], one per ``block_size`` elements in row-major order: float32, float16, bfloat16, or
            uint8 codes.
        nested_absmax, nested_offset: float32 [nested blocks] and [], the scales of those codes, one per
            ``nested_block_size`` codes, and the mean that was subtracted before; None without double quantization.
        shape, dtype: of the tensor that was quantized.
        code: the name of the 16 values.
        scale_table: float32 [256], the values of ``absmax`` if it holds uint8 codes of another map than that of double
            quantization. If ``nested_absmax`` is given, it multiplies them.
        block_offsets: [blocks], added to each block's elements after scaling: float32, float16 or bfloat16; or uint8,
            and then the offset is minus their product with ``offset_scale``.
        offset_scale: float32 [nested blocks], the unit of uint8 offsets; without it, the unit is the block's scale, and
            the offsets are zero points.
        column_order: int32 [K], for each stored column of a matrix [N, K] its number; None if they are in order.

    Example:
        >>> w4 = qlora_ext.quantize(torch.randn(48, 64), "q4_1")
        >>> {name: t.dtype for name, t in w4.tensors.items()}
        {'packed': torch.uint8, 'absmax': torch.float16, 'block_offsets': torch.float16}
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int = 64
    nested_block_size: int = 256
    code: str = formats.NF4
    scale_table: Tensor | None = None
    block_offsets: Tensor | None = None
    offset_scale: Tensor | None = None
    column_order: Tensor | None = None

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored as 8-bit codes with nested scales of their own."""
        return self.nested_offset is not None

    @property
    def form(self) -> Form:
        """The code, the forms of scales and offsets, and the block sizes as one value.

        Raises:
            ValueError: the scales or the offsets have a dtype that no form has.
        """
        if self.scale_table is not None:
            scales = formats.TABLE8 if self.nested_absmax is None else formats.NESTED_TABLE8
        else:
            scales = formats.NESTED8 if self.double_quant else name_of(self.absmax.dtype)
        offsets = None
        if self.block_offsets is not None and self.block_offsets.dtype == torch.uint8:
            offsets = formats.ZERO_POINT8 if self.offset_scale is None else formats.SCALED8
        elif self.block_offsets is not None:
            offsets = name_of(self.block_offsets.dtype)
        reordered = self.column_order is not None
        return Form(self.code, scales, self.block_size, self.nested_block_size, offsets, reordered)

    @property
    def device(self) -> torch.device:
        """The device of the packed codes and scales."""
        return self.packed.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The packed codes and the existing scales, by the names of their attributes."""
        return {name: t for name in TENSORS if (t := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and all scales."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_param(self) -> float:
        """Bits per element, including scales: about 4.127 with the default blocks and double quantization."""
        return 8.0 * self.nbytes / max(math.prod(self.shape), 1)

    def packed_args(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]:
        """The first six arguments that describe a packed weight to every operator of ``torch.ops.qlora``."""
        return (
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.block_size,
            self.nested_block_size,
        )

    def last_args(self) -> tuple[str, Tensor | None, Tensor | None, Tensor | None]:
        """The last four arguments of every such operator."""
        return self.code, self.scale_table, self.block_offsets, self.offset_scale

    def decoded_scales(self) -> Tensor:
        """The decoded scales, float32 [blocks]; of a stack [E, blocks]."""
        if self.double_quant and self._is_stack:
            return torch.stack([self.matrix(e).decoded_scales() for e in range(self.shape[0])])
        if self.double_quant:
            nested = self.nested_absmax, self.nested_offset
            scales: Tensor = torch.ops.qlora.dequantize_absmax(self.absmax, *nested, self.nested_block_size)
        elif self.scale_table is None:
            scales = self.absmax.float()
        else:
            scales = self.scale_table.gather(-1, self.absmax.long())
            if self.nested_absmax is not None:
                scales = scales * self._per_block(self.nested_absmax)
        return scales

    def decoded_offsets(self, scales: Tensor | None = None) -> Tensor | None:
        """The decoded offsets, float32, of the shape of ``decoded_scales()``; None if there are none.

        A zero point becomes -(zero point · scale), rounded. ``dequantize`` subtracts it before scaling, which gives the
        same values if scales have 16 bits.

        Args:
            scales: the result of ``decoded_scales()``, if it is known.
        """
        if self.block_offsets is None or self.block_offsets.dtype != torch.uint8:
            return None if self.block_offsets is None else self.block_offsets.float()
        if self.offset_scale is not None:
            unit = self._per_block(self.offset_scale)
        else:
            unit = self.decoded_scales() if scales is None else scales
        return -(self.block_offsets.float() * unit)

    def without_offsets(self, w: Tensor, scales: Tensor | None = None) -> Tensor:
        """``w``, of this weight's shape, less the offsets, in the order of its columns: what the codes encode.

        Args:
            scales: as in ``decoded_offsets``.
        """
        offsets = self.decoded_offsets(scales)
        if self.column_order is not None:
            w = w.index_select(-1, self.column_order)
        if offsets is None:
            return w
        per_element = offsets.repeat_interleave(self.block_size, -1)[..., : math.prod(self.shape[offsets.ndim - 1 :])]
        return w.float() - per_element.view(self.shape)

    @property
    def _is_stack(self) -> bool:
        """Whether each matrix has its own scales. Operators take the matrices of a stack one by one."""
        return len(self.shape) == 3 and self.absmax.ndim == 2

    def _per_block(self, nested: Tensor) -> Tensor:
        """For each block, the value of its nested block."""
        return nested.repeat_interleave(self.nested_block_size, -1)[..., : self.absmax.shape[-1]]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded tensor of shape ``shape`` in ``dtype`` (default: the original's), rounded once from float32."""
        dtype = dtype or self.dtype
        if dtype == torch.float64:
            return self.dequantize(torch.float32).double()
        if self._is_stack:
            stack = torch.empty(self.shape, dtype=dtype, device=self.device)
            for e, matrix in enumerate(stack):
                matrix.copy_(self.matrix(e).dequantize(dtype))
            return stack
        out: Tensor = torch.ops.qlora.dequantize_nf4(*self.packed_args(), self.shape, dtype, *self.last_args())
        return self.columns_in_order(out)

    def columns_in_order(self, decoded: Tensor) -> Tensor:
        """Puts decoded values [..., K], which are in the order of the stored columns, in the order of the weight's."""
        if self.column_order is None:
            return decoded
        return torch.empty_like(decoded).index_copy_(-1, self.column_order.long(), decoded)

    def to(self: Self, device: torch.device | str | int) -> Self:
        """The same bits on another device.

        Raises:
            TypeError: ``device`` is a dtype. Use ``dequantize(dtype)`` for the decoded tensor.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: expected a device, got {device}; use dequantize(dtype) for the decoded tensor")
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors.items()}
        return dataclasses.replace(self, **moved)

    def matrix(self: Self, e: int) -> Self:
        """Matrix ``e`` [N, K] of a stack [E, N, K], as a view. The matrices of a stack are quantized separately."""
        for name, t in self.tensors.items():
            if t.shape[:1] != self.shape[:1]:
                raise ValueError(f"{name}: expected a stack of {self.shape[0]}, got the shape {list(t.shape)}")
        parts: dict[str, Any] = {name: t[e] for name, t in self.tensors.items()}
        return dataclasses.replace(self, **parts, shape=self.shape[1:])

    @staticmethod
    def stack(matrices: Sequence[Self]) -> Self:
        """The stack [E, N, K] of matrices [N, K] that have the same form."""
        first, tensors = matrices[0], [matrix.tensors for matrix in matrices]
        parts: dict[str, Any] = {name: torch.stack([t[name] for t in tensors]) for name in first.tensors}
        return dataclasses.replace(first, **parts, shape=torch.Size((len(matrices), *first.shape)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, {self.form}, "
            f"bits_per_param={self.bits_per_param:.3f}, device={self.device})"
        )

    @classmethod
    def from_bitsandbytes(cls, state_dict: dict[str, Tensor], prefix: str) -> Weight4bit:
        """Reads the tensors that bitsandbytes saves for one weight in NF4 or FP4; see ``NF4Weight.from_bitsandbytes``.

        Raises:
            KeyError: a key is missing. ValueError: the weight has another code, or its tensors have wrong dtypes,
                shapes or values.
        """
        fields = bitsandbytes_format.read(state_dict, prefix, bitsandbytes_format.CODES)
        return (NF4Weight if fields["code"] == formats.NF4 else Weight4bit)(**fields)

    def to_bitsandbytes(self, prefix: str) -> dict[str, Tensor]:
        """The keys and tensors, to the byte, that bitsandbytes saves for this weight under the name ``prefix``.

        Raises:
            ValueError: bitsandbytes does not have this weight's form.
        """
        form = self.form
        if form.code not in bitsandbytes_format.CODES:
            expected = " or ".join(bitsandbytes_format.CODES)
            raise ValueError(f"code: expected {expected}, got {form.code}, which bitsandbytes lacks")
        if form.scales not in (formats.FLOAT32, formats.NESTED8) or form.offsets is not None:
            raise ValueError(
                f"scales: expected float32 or nested8 without offsets, got {form}, which bitsandbytes lacks"
            )
        fields: Any = vars(self)
        return bitsandbytes_format.write(fields, prefix)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NF4Weight(Weight4bit):
    """A tensor in 4-bit NormalFloat (QLoRA, Dettmers et al., 2023), in bitsandbytes' memory layout.

    Attributes:
        packed: uint8, [..., K/2]: element 2i in the high nibble of byte i, 2i+1 in the low one.
        absmax: scales, one per block of ``block_size`` elements: float32, or uint8 codes with double quantization.
        nested_absmax, nested_offset: float32 scales of those codes and their mean; None without double quantization.
        shape, dtype: of the tensor that was quantized.

    Example:
        >>> w4 = qlora_ext.quantize_nf4(torch.randn(1024, 1024))
        >>> w4.shape, w4.nbytes, round(w4.bits_per_param, 3)
        (torch.Size([1024, 1024]), 540932, 4.127)
    """

    def __post_init__(self) -> None:
        if self.code != formats.NF4:
            raise ValueError(f"code: expected {formats.NF4}, got {self.code}")

    @classmethod
    def from_bitsandbytes(cls, state_dict: dict[str, Tensor], prefix: str) -> NF4Weight:
        """Reads the tensors that bitsandbytes (>= 0.41) saves for one 4-bit weight; see ``to_bitsandbytes``.

        Args:
            state_dict: has ``prefix`` (the packed bytes), ``prefix.absmax``, ``prefix.quant_map``,
                ``prefix.quant_state.bitsandbytes__nf4`` and, with double quantization, ``prefix.nested_absmax`` and
                ``prefix.nested_quant_map``.
            prefix: the name of the weight, e.g. ``"model.layers.0.mlp.up_proj.weight"``.

        Raises:
            KeyError: a key is missing. ValueError: the weight is not NF4, or its tensors have wrong dtypes, shapes or
                values.
        """
        return cls(**bitsandbytes_format.read(state_dict, prefix))


def weight_of(form: Form, **fields: Any) -> Weight4bit:
    """The weight of that form, an ``NF4Weight`` if its code is NF4; ``fields`` are its tensors, shape and dtype."""
    cls = NF4Weight if form.code == formats.NF4 else Weight4bit
    return cls(**fields, block_size=form.block_size, nested_block_size=form.nested_block_size, code=form.code)


# A pickled weight contains tensors and numbers only, so torch.load may read it with weights_only=True.
torch.serialization.add_safe_globals([Weight4bit, NF4Weight])


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
    flat = int(bad[0])
    index = []
    for size in reversed(w.shape):
        index.append(flat % size)
        flat //= size
    where = tuple(reversed(index))
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


def quantize(w: Tensor, form: Form | str) -> Weight4bit:
    """Quantizes a tensor to a 4-bit format by the format's own recipe.

    The names of formats, their values, the elements per scale, the bits per element, and how scales are computed::

        nf4     NF4     64  4.13  as in quantize_nf4 (bitsandbytes)
        fp4     FP4     64  4.13  the same (bitsandbytes)
        mxfp4   E2M1    32  4.25  a power of two (OCP Microscaling Formats 1.0)
        nvfp4   E2M1    16  4.5   E4M3, with a factor for the tensor (compressed-tensors)
        int4    -8..7   32  4.5   bfloat16: the largest magnitude is 7.5 (compressed-tensors)
        q4_0    -8..7   32  4.5   float16: the element of the largest magnitude is -8 (ggml)
        q4_1    0..15   32  5     float16, and an offset: the least element is 0, the largest is 15 (ggml)
        q4_k    0..15   32  4.5   6 bits times float16, and an offset, with the least weighted error (ggml)
        iq4_nl  IQ4_NL  32  4.5   float16, with the least error for its codes (ggml, without its search)

    Args:
        w: as in ``quantize_nf4``.
        form: one of these names, or a ``Form``, for example one of these with another block size:
            ``qlora_ext.Form("int4", "bfloat16", block_size=128)``.

    Returns:
        The weight, on the device of ``w``.

    Raises:
        TypeError: ``w`` is not a tensor of one of these dtypes. ValueError: there is no recipe for the form; or ``w``
            has a NaN or an infinity (the message gives its index), or values that are too large for the scales.

    Example:
        >>> w4 = qlora_ext.quantize(torch.randn(48, 64), "mxfp4")
        >>> w4.form.code, w4.block_size, w4.absmax.dtype, w4.bits_per_param > 4.25
        ('e2m1', 32, torch.uint8, True)
        >>> qlora_ext.quantize(torch.randn(48, 64), "int3")
        Traceback (most recent call last):
        ValueError: form: expected nf4, fp4, mxfp4, nvfp4, int4, q4_0, q4_1, q4_k, iq4_nl or a Form, got 'int3'
    """
    if isinstance(form, str):
        form = Form.named(form)
    if not isinstance(w, Tensor):
        raise TypeError(f"w: expected a torch.Tensor, got {type(w).__name__}")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"w: expected float32, bfloat16 or float16, got {w.dtype}")
    w = w.detach()
    tensors: dict[str, Tensor | None] = {"nested_absmax": None, "nested_offset": None, **recipes.tensors_of(w, form)}
    w4 = weight_of(form, **tensors, shape=w.shape, dtype=w.dtype)
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
