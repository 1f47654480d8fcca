"""``Weight4bit``: a frozen tensor stored as codes and scales. ``NF4Weight`` is the one whose code is NF4."""

from __future__ import annotations

import copy
import hashlib
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import bitsandbytes_format, formats, weight_ops
from ._internal.integrate import integrate
from ._internal.shared_buffers import PackedTensors
from .dtype_names import name_of
from .form import Form

Self = TypeVar("Self", bound="Weight4bit")


# The names of a weight's tensors.
TENSORS: tuple[str, ...] = PackedTensors._fields


class Numbers(NamedTuple):
    """What describes a weight besides its tensors, shape and dtype; ``Form`` has attributes of these names too."""

    block_size: int
    nested_block_size: int
    code: str


_NUMBERS = Numbers._fields


class Weight4bit(Tensor):
    """A frozen tensor with 4 to 8 bits per element. Each element is a value of the code times the scale of its block.

    It has the shape of the tensor that was quantized, and the dtype to which it decodes. Functions that read it get the
    decoded values; ``torch.nn.functional.linear`` and ``embedding`` run on the codes. Moving, copying, saving and
    slicing by whole rows keep the codes. Changing the dtype changes that of the decoded values. A change of the values
    is an error, and so is a gradient. As the parameter of a module, it is frozen::

        layer.weight = nn.Parameter(qlora_ext.quantize(layer.weight, "nf4"))

    Attributes:
        packed: uint8 [..., K * bits / 8]. With 4 bits, element 2i is in the high nibble of byte i, and element 2i+1 in
            the low nibble. With 8 bits, codes are bytes. With 5 and 6 bits, each 32 elements have 16 bytes of low 4
            bits, packed likewise, and then 4 or 8 bytes of upper bits, those of lower elements in lower bits.
        absmax: the scales [blocks], one per ``block_size`` elements in row-major order: float32, float16, bfloat16, or
            uint8 codes.
        nested_absmax, nested_offset: float32 [nested blocks] and [], the scales of those codes, one per
            ``nested_block_size`` codes, and the mean that was subtracted before; None without double quantization.
        code: the name of the values of the codes, as in ``Form``.
        scale_table: float32 [256], the values of ``absmax`` if it holds uint8 codes of another map than that of double
            quantization. If ``nested_absmax`` is given, it multiplies them.
        block_offsets: [blocks], added to each block's elements after scaling: float32, float16 or bfloat16; or uint8,
            and then the offset is minus their product with ``offset_scale``.
        offset_scale: float32 [nested blocks], the unit of uint8 offsets; without it, the unit is the block's scale, and
            the offsets are zero points.
        column_order: int32 [K], for each stored column of a matrix [N, K] its number; None if they are in order.

    Example:
        >>> w4 = qlora_ext.quantize(torch.randn(48, 64), "q4_1")
        >>> w4.shape, {name: t.dtype for name, t in w4.tensors.items()}
        (torch.Size([48, 64]), {'packed': torch.uint8, 'absmax': torch.float16, 'block_offsets': torch.float16})
        >>> torch.equal(2 * w4, 2 * w4.dequantize())
        True
        >>> w4.mul_(2)
        Traceback (most recent call last):
        RuntimeError: mul_: a 4-bit weight is frozen; train an adapter, or replace the weight by qlora_ext.quantize(w)
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    block_size: int
    nested_block_size: int
    code: str
    scale_table: Tensor | None
    block_offsets: Tensor | None
    offset_scale: Tensor | None
    column_order: Tensor | None

    def __new__(cls: type[Self], packed: Tensor | None = None, *_: Any, **fields: Any) -> Self:
        # Pickles of version 0.1.0 make an empty object and then call __setstate__.
        shape, dtype = fields.get("shape", (0,)), fields.get("dtype", torch.float32)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
        if packed is not None and not isinstance(packed, Tensor):
            raise TypeError(f"packed: expected a tensor, got {type(packed).__name__}")
        device = torch.device("cpu") if packed is None else packed.device
        try:
            w4: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"shape: expected a list of sizes, got {shape!r}") from error
        return w4

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None = None,
        nested_offset: Tensor | None = None,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        block_size: int = 64,
        nested_block_size: int = 256,
        code: str = formats.NF4,
        scale_table: Tensor | None = None,
        block_offsets: Tensor | None = None,
        offset_scale: Tensor | None = None,
        column_order: Tensor | None = None,
    ) -> None:
        integrate()
        for name, t in (("packed", packed), ("absmax", absmax)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if column_order is not None:  # the others are checked by the operators
            if not isinstance(column_order, Tensor) or column_order.dtype != torch.int32:
                raise TypeError(f"column_order: expected an int32 tensor or None, got {reprlib.repr(column_order)}")
            if tuple(column_order.shape) != tuple(shape[-1:]):
                expected = [*shape[-1:]]
                raise ValueError(f"column_order: expected shape {expected}, got {list(column_order.shape)}")
        self.packed, self.absmax = packed, absmax
        self.nested_absmax, self.nested_offset = nested_absmax, nested_offset
        self.scale_table, self.block_offsets, self.offset_scale = scale_table, block_offsets, offset_scale
        self.column_order = column_order
        self.block_size, self.nested_block_size, self.code = block_size, nested_block_size, code

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return [*self.tensors], (type(self), self.dtype, *(getattr(self, name) for name in _NUMBERS))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: tuple[Any, ...], size: Any, stride: Any) -> Weight4bit:
        cls, dtype, *numbers = context
        w4: Weight4bit = cls(**inner, shape=size, dtype=dtype, **dict(zip(_NUMBERS, numbers, strict=True)))
        return w4

    def _stable_hash_for_caching(self) -> str:
        # Everything but the values, for torch's cache of compiled graphs.
        names, context = self.__tensor_flatten__()
        tensors = {name: getattr(self, name) for name in names}
        layouts = {name: (t.shape, t.stride(), t.storage_offset(), t.dtype, t.device) for name, t in tensors.items()}
        return hashlib.sha256(repr((self.shape, context, layouts)).encode()).hexdigest()

    __torch_function__ = classmethod(weight_ops.torch_function)
    __torch_dispatch__ = classmethod(weight_ops.torch_dispatch)  # type: ignore[assignment]

    if TYPE_CHECKING:  # what keeps the codes

        def to(self: Self, *args: Any, **kwargs: Any) -> Self: ...
        def detach(self: Self) -> Self: ...

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        others = {name: getattr(self, name) for name in _NUMBERS}
        return {name: getattr(self, name) for name in TENSORS} | {"shape": self.shape, "dtype": self.dtype} | others

    def replace(self: Self, **changes: Any) -> Self:
        """The weight with other ``fields``.

        Example:
            >>> w4 = qlora_ext.quantize_nf4(torch.randn(48, 64))
            >>> w4.replace(dtype=torch.float16).dequantize().dtype
            torch.float16
        """
        return type(self)(**(self.fields | changes))

    def map(self: Self, function: Callable[[Tensor], Tensor], **changes: Any) -> Self:
        """The weight with ``function`` applied to each of its tensors, and other ``fields``."""
        return self.replace(**{name: function(t) for name, t in self.tensors.items()}, **changes)

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
    def tensors(self) -> dict[str, Tensor]:
        """The packed codes and the existing scales, by the names of their attributes."""
        return {name: t for name in TENSORS if (t := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed codes and all scales."""
        return sum(t.nbytes for t in self.tensors.values())

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes per element, including scales, so that ``numel() * element_size()`` is the memory."""
        return self.nbytes / max(self.numel(), 1)

    @property
    def itemsize(self) -> float:  # type: ignore[override]
        """``element_size()``."""
        return self.element_size()

    @property
    def bits_per_param(self) -> float:
        """Bits per element, including scales: about 4.127 with the default blocks and double quantization."""
        return 8.0 * self.element_size()

    def operands(self, *between: Any) -> tuple[Any, ...]:
        """The arguments that describe the weight to an operator of ``torch.ops.qlora``, and those ``between`` them.

        Every such operator takes ``packed``, ``absmax``, ``nested_absmax``, ``nested_offset``, ``block_size`` and
        ``nested_block_size``, then arguments of its own, and then ``code``, ``scale_table``, ``block_offsets`` and
        ``offset_scale``.

        Example:
            >>> w4 = qlora_ext.quantize_nf4(torch.randn(48, 64))
            >>> w = torch.ops.qlora.dequantize_nf4(*w4.operands([48, 64], torch.float32))
            >>> torch.equal(w, w4.dequantize())
            True
        """
        return operands(self, self, *between)

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
        return self.ndim == 3 and self.absmax.ndim == 2

    def _per_block(self, nested: Tensor) -> Tensor:
        """For each block, the value of its nested block."""
        return nested.repeat_interleave(self.nested_block_size, -1)[..., : self.absmax.shape[-1]]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded tensor in ``dtype`` (default: the weight's own), rounded once from float32."""
        dtype = dtype or self.dtype
        if dtype == torch.float64:
            return self.dequantize(torch.float32).double()
        if self._is_stack:
            stack = torch.empty(self.shape, dtype=dtype, device=self.device)
            for e, matrix in enumerate(stack):
                matrix.copy_(self.matrix(e).dequantize(dtype))
            return stack
        out: Tensor = torch.ops.qlora.dequantize_nf4(*operands(self, self, self.shape, dtype))
        return self.columns_in_order(out)

    def columns_in_order(self, decoded: Tensor) -> Tensor:
        """Puts decoded values [..., K], which are in the order of the stored columns, in the order of the weight's."""
        if self.column_order is None:
            return decoded
        return torch.empty_like(decoded).index_copy_(-1, self.column_order.long(), decoded)

    def matrix(self: Self, e: int) -> Self:
        """Matrix ``e`` [N, K] of a stack [E, N, K], as a view. The matrices of a stack are quantized separately."""
        for name, t in self.tensors.items():
            if t.shape[:1] != self.shape[:1]:
                raise ValueError(f"{name}: expected a stack of {self.shape[0]}, got the shape {list(t.shape)}")
        return self.map(lambda t: t[e], shape=self.shape[1:])

    @staticmethod
    def stack(matrices: Sequence[Self]) -> Self:
        """The stack [E, N, K] of matrices [N, K] that have the same form."""
        first, tensors = matrices[0], [matrix.tensors for matrix in matrices]
        parts: dict[str, Any] = {name: torch.stack([t[name] for t in tensors]) for name in first.tensors}
        return first.replace(**parts, shape=(len(matrices), *first.shape))

    def become(self, other: Weight4bit) -> bool:
        """Makes this tensor, and so everything that holds it, the weight ``other`` of the same shape, without a copy.

        Returns:
            False, and nothing changes, if torch cannot move a tensor in place to the device of ``other``.
        """
        with torch._C.DisableTorchFunctionSubclass():
            if (self.dtype, self.device) != (other.dtype, other.device):
                if not torch._has_compatible_shallow_copy_type(self, other):
                    return False
                self.data = other
        self.__class__ = type(other)  # of another code
        for name in (*TENSORS, *_NUMBERS):
            setattr(self, name, getattr(other, name))
        return True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, {self.form}, "
            f"bits_per_param={self.bits_per_param:.3f}, device={self.device})"
        )

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        fields = {name: copy.deepcopy(value, memo) for name, value in self.fields.items()}
        memo[id(self)] = copied = type(self)(**fields)
        vars(copied).update(copy.deepcopy({k: v for k, v in vars(self).items() if k not in fields}, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        others = {name: value for name, value in vars(self).items() if name not in self.fields}
        return _unpickled, (type(self), self.fields, others)

    def __setstate__(self, fields: dict[str, Any]) -> None:
        torch.utils.swap_tensors(self, type(self)(**fields))

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
        return bitsandbytes_format.write(self, prefix)


class NF4Weight(Weight4bit):
    """A tensor in 4-bit NormalFloat (QLoRA, Dettmers et al., 2023), in bitsandbytes' memory layout.

    Attributes:
        packed: uint8, [..., K/2]: element 2i in the high nibble of byte i, 2i+1 in the low one.
        absmax: scales, one per block of ``block_size`` elements: float32, or uint8 codes with double quantization.
        nested_absmax, nested_offset: float32 scales of those codes and their mean; None without double quantization.

    Example:
        >>> w4 = qlora_ext.quantize_nf4(torch.randn(1024, 1024))
        >>> w4.shape, w4.nbytes, round(w4.bits_per_param, 3)
        (torch.Size([1024, 1024]), 540932, 4.127)
    """

    def __init__(self, *tensors: Any, **fields: Any) -> None:
        super().__init__(*tensors, **fields)
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


# A function for our own code, because Dynamo does not trace methods of a tensor that return strings.
def operands(w: Weight4bit | PackedTensors, form: Weight4bit | Form | Numbers, *between: Any) -> tuple[Any, ...]:
    """``Weight4bit.operands`` of the tensors ``w`` and the numbers of ``form``."""
    first = w.packed, w.absmax, w.nested_absmax, w.nested_offset, form.block_size, form.nested_block_size
    return *first, *between, form.code, w.scale_table, w.block_offsets, w.offset_scale


def weight_of(form: Form, **fields: Any) -> Weight4bit:
    """The weight of that form, an ``NF4Weight`` if its code is NF4; ``fields`` are its tensors, shape and dtype."""
    cls = NF4Weight if form.code == formats.NF4 else Weight4bit
    return cls(**fields, block_size=form.block_size, nested_block_size=form.nested_block_size, code=form.code)


def _unpickled(cls: type[Weight4bit], fields: dict[str, Any], others: dict[str, Any]) -> Weight4bit:
    w4 = cls(**fields)
    vars(w4).update(others)
    return w4


# A pickled weight contains tensors and numbers only, so torch.load may read it with weights_only=True. Version 0.1.0
# had the classes in another module.
_OLD_NAMES: list[Any] = [(cls, f"qlora_ext.weight.{cls.__name__}") for cls in (Weight4bit, NF4Weight)]
torch.serialization.add_safe_globals([Weight4bit, NF4Weight, _unpickled, *_OLD_NAMES])
