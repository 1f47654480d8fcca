"""A stack of NF4 weights, each over rows of its own: the linear layers of a mixture of experts.

``torch.ops.qlora.grouped_linear_nf4`` and the two operators of its backward run ``linear_nf4``, ``linear_nf4_dx`` and
``linear_nf4_dlora`` once for every expert that has rows. They are operators so that a compiler sees one call of a known
shape where there is a loop whose bounds are data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import ops
from .arguments import arguments_of
from .autograd import below_autograd, differentiable, no_tangent, refuse_tangent  # and linear_nf4 is registered

_PACKED = (
    "Tensor offsets, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "int block_size, int nested_block_size"
)
_LORA = "Tensor? lora_a, Tensor? lora_b, float scaling"
_LIBRARY = torch.library.Library("qlora", "FRAGMENT")
_LIBRARY.define(f"grouped_linear_nf4(Tensor x, {_PACKED}, SymInt out_features, Tensor? bias, {_LORA}) -> Tensor")
_LIBRARY.define(f"grouped_linear_nf4_dx(Tensor dy, {_PACKED}, SymInt in_features, {_LORA}) -> Tensor")
_LIBRARY.define(
    "grouped_linear_nf4_dlora(Tensor dy, Tensor x, Tensor offsets, Tensor lora_a, Tensor lora_b, float scaling) "
    "-> (Tensor, Tensor)"
)


def _groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, and which: expert e's end at offsets[e].

    The first comes in any case: the operator that it is handed to checks the arguments.
    """
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if not begin <= end <= rows:
            raise ValueError(f"offsets: expected ascending row numbers up to {rows}, got {end} for expert {expert}")
        if end > begin or expert == 0:
            yield expert, slice(begin, end)
        begin = end


def _at(stack: Tensor | None, expert: int) -> Tensor | None:
    return None if stack is None else stack[expert]


def _check(name: str, t: Tensor | None, *shape: int | None) -> None:
    """``shape`` has None where any size will do."""
    if t is not None and not (
        t.ndim == len(shape) and all(b in (None, a) for a, b in zip(t.shape, shape, strict=True))
    ):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(t.shape)}")


def _require(**tensors: Tensor | None) -> None:
    """torch hands None over for a tensor, too."""
    for name, t in tensors.items():
        if t is None:
            raise ValueError(f"{name}: expected a tensor, got None")


def _check_offsets(offsets: Tensor, experts: int) -> None:
    _check("offsets", offsets, experts)
    if offsets.is_meta:
        raise ValueError("offsets: expected row numbers, got a tensor on the meta device")
    if offsets.dtype != torch.int64 or offsets.layout != torch.strided:
        raise ValueError(f"offsets: expected a dense int64 tensor, got {offsets.dtype} ({offsets.layout})")


def _check_stack(offsets: Tensor, packed: Tensor, given: int, name: str, size: int, **others: Tensor | None) -> None:
    """That packed holds ``given`` x ``size`` (the argument ``name``) codes an expert, and all others one slice each.

    What is in a slice the operator checks.
    """
    if size < 0:
        raise ValueError(f"{name}: expected a size, got {size}")
    experts = packed.shape[0] if packed.ndim else 0
    if packed.numel() != experts * ((given * size + 1) // 2) or packed.ndim == 0:
        raise ValueError(
            f"packed: expected a stack of weights, {(given * size + 1) // 2} bytes each ({name} = {size} by {given}), "
            f"got shape {list(packed.shape)}"
        )
    _check_offsets(offsets, experts)
    for other, t in others.items():
        if t is not None and (t.ndim == 0 or t.shape[0] != experts):
            raise ValueError(f"{other}: expected {experts} slices, one an expert, got shape {list(t.shape)}")


def grouped_linear_nf4(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    nested_block_size: int,
    out_features: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    """y[i] = x[i] · dequantize(w[e])ᵀ + scaling · x[i] · lora_a[e]ᵀ · lora_b[e]ᵀ + bias[e], e the expert of row i.

    Args:
        x: [S, K], its rows in the order of their experts.
        offsets: [E] int64: expert e's rows end at ``offsets[e]``. Rows behind the last one give zeros.
        packed, absmax, nested_absmax, nested_offset: of E weights [N, K], one stacked on the other: uint8 [E, N, K/2],
            [E, blocks], and float32 [E, nested blocks] and [E].
        block_size, nested_block_size: of those weights.
        out_features: N.
        bias: [E, N].
        lora_a, lora_b: [E, R, K] and [E, N, R], both or neither; with ``bias`` in x's dtype.

    Returns:
        y [S, N] in x's dtype, differentiable in x, bias, lora_a and lora_b.
    """
    _require(x=x, offsets=offsets, packed=packed, absmax=absmax)
    _check("x", x, None, None)
    state = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _check_stack(
        offsets, packed, x.shape[1], "out_features", out_features, **state, bias=bias, lora_a=lora_a, lora_b=lora_b
    )
    y = x.new_zeros(x.shape[0], out_features)
    with torch.autocast(x.device.type, enabled=False):
        for e, rows in _groups(offsets, x.shape[0]):
            y[rows] = torch.ops.qlora.linear_nf4.default(
                x[rows],
                packed[e],
                absmax[e],
                _at(nested_absmax, e),
                _at(nested_offset, e),
                block_size,
                nested_block_size,
                out_features,
                _at(bias, e),
                _at(lora_a, e),
                _at(lora_b, e),
                scaling,
                0.0,
                0,
            )
    return y


def _dx(
    dy: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    nested_block_size: int,
    in_features: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    _require(dy=dy, offsets=offsets, packed=packed, absmax=absmax)
    _check("dy", dy, None, None)
    state = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _check_stack(offsets, packed, dy.shape[1], "in_features", in_features, **state, lora_a=lora_a, lora_b=lora_b)
    dx = dy.new_zeros(dy.shape[0], in_features)
    for e, rows in _groups(offsets, dy.shape[0]):
        dx[rows] = torch.ops.qlora.linear_nf4_dx.default(
            dy[rows],
            packed[e],
            absmax[e],
            _at(nested_absmax, e),
            _at(nested_offset, e),
            block_size,
            nested_block_size,
            in_features,
            _at(lora_a, e),
            _at(lora_b, e),
            scaling,
            0.0,
            0,
        )
    return dx


def _dlora(
    dy: Tensor, x: Tensor, offsets: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    _require(dy=dy, x=x, offsets=offsets, lora_a=lora_a, lora_b=lora_b)
    _check("x", x, None, None)
    _check("dy", dy, x.shape[0], None)
    _check("lora_a", lora_a, None, None, x.shape[1])
    _check("lora_b", lora_b, lora_a.shape[0], dy.shape[1], lora_a.shape[1])
    _check_offsets(offsets, lora_a.shape[0])
    da, db = lora_a.new_zeros(lora_a.shape), lora_b.new_zeros(lora_b.shape)
    for e, rows in _groups(offsets, dy.shape[0]):
        da[e], db[e] = torch.ops.qlora.linear_nf4_dlora.default(
            dy[rows], x[rows], lora_a[e], lora_b[e], scaling, 0.0, 0
        )
    return da, db


_GROUPED = arguments_of(torch.ops.qlora.grouped_linear_nf4.default)
_GROUPED_DX = arguments_of(torch.ops.qlora.grouped_linear_nf4_dx.default)
_kernel = below_autograd(torch.ops.qlora.grouped_linear_nf4.default)


class _GroupedLinearNF4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        a = _GROUPED(*args)
        x = a.x if a.lora_a is not None else None
        packed = a.packed, a.absmax, a.nested_absmax, a.nested_offset
        ctx.save_for_backward(x, a.lora_a, a.lora_b, a.offsets, *packed)
        ctx.block_sizes = a.block_size, a.nested_block_size
        ctx.in_features, ctx.scaling = a.x.shape[-1], a.scaling
        ctx.bias_shape = None if a.bias is None else a.bias.shape
        return _kernel(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_tangent("the backward of grouped_linear_nf4", dy)
        x, lora_a, lora_b, offsets, *packed = ctx.saved_tensors
        needs = _GROUPED(*ctx.needs_input_grad)
        dy = dy.contiguous()
        dx = da = db = dbias = None
        if needs.x:
            dx = torch.ops.qlora.grouped_linear_nf4_dx.default(
                dy, offsets, *packed, *ctx.block_sizes, ctx.in_features, lora_a, lora_b, ctx.scaling
            )
        if needs.bias:
            expert = torch.searchsorted(offsets, torch.arange(dy.shape[0], device=dy.device), right=True)
            experts, n = ctx.bias_shape
            dbias = dy.new_zeros(experts + 1, n).index_add(0, expert, dy)[:experts]
        if needs.lora_a or needs.lora_b:
            da, db = torch.ops.qlora.grouped_linear_nf4_dlora.default(dy, x, offsets, lora_a, lora_b, ctx.scaling)
        da, db = da if needs.lora_a else None, db if needs.lora_b else None
        return (*_GROUPED(x=dx, bias=dbias, lora_a=da, lora_b=db),)


_differentiable = differentiable(_kernel, _GroupedLinearNF4, lambda args: no_tangent("grouped_linear_nf4"))
_LIBRARY.impl("grouped_linear_nf4", grouped_linear_nf4, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_linear_nf4_dx", _dx, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_linear_nf4_dlora", _dlora, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_linear_nf4", _differentiable, "Autograd")


@torch.library.register_fake("qlora::grouped_linear_nf4")
def _(*args: Any) -> Tensor:
    a = _GROUPED(*args)
    ops.check_block_sizes(a.block_size, a.nested_block_size)
    ops.check_lora_numbers(a.scaling, 0.0)
    ops.check_one_device("grouped_linear_nf4", *args, but="offsets")
    y: Tensor = a.x.new_empty((a.x.shape[0], a.out_features))
    return y


@torch.library.register_fake("qlora::grouped_linear_nf4_dx")
def _(*args: Any) -> Tensor:
    a = _GROUPED_DX(*args)
    ops.check_block_sizes(a.block_size, a.nested_block_size)
    ops.check_lora_numbers(a.scaling, 0.0)
    ops.check_one_device("grouped_linear_nf4_dx", *args, but="offsets")
    dx: Tensor = a.dy.new_empty((a.dy.shape[0], a.in_features))
    return dx


@torch.library.register_fake("qlora::grouped_linear_nf4_dlora")
def _(dy: Tensor, x: Tensor, offsets: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    ops.check_one_device("grouped_linear_nf4_dlora", dy, x, offsets, lora_a, lora_b, but="offsets")
    return lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)
