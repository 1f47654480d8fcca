"""Products of dense weights of 16 bits that are computed in float32, without a copy of the weight in float32.

``torch.ops.qlora.linear_dense`` is y = x · weightᵀ + bias, with x [..., K] and bias [N] in float32, and weight [N, K]
in bfloat16 or float16. ``linear_dense_dx`` is dx = dy · weight. Both are for the CPU. Gradients reach x and bias; the
weight is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import dtypes
from ._internal.dynamo import constant_in_graphs
from ._library import LIBRARY
from .autograd import below_autograd, differentiable, no_tangent, refuse_tangent
from .ops import autocast_dtype, register_fake

_kernel = below_autograd(torch.ops.qlora.linear_dense.default)
_kernel_dx = below_autograd(torch.ops.qlora.linear_dense_dx.default)


class _LinearDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if ctx.needs_input_grad[1]:
            raise ValueError("weight: expected a frozen weight, got one that requires a gradient")
        ctx.save_for_backward(weight)
        y: Tensor = _kernel(x, weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_tangent("the backward of linear_dense", dy)
        (weight,) = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = _kernel_dx(dy, weight) if needs[0] else None
        dbias = dy.sum_to_size(dy.shape[-1]) if needs[2:] == (True,) else None
        return (dx, None, dbias)[: len(needs)]


_linear_dense = differentiable(_kernel, _LinearDense, lambda args: no_tangent("linear_dense"))
LIBRARY.impl("linear_dense", _linear_dense, "Autograd")


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"weight: expected bfloat16 or float16, got {weight.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [out_features, in_features], got {list(weight.shape)}")


@register_fake("linear_dense")
def _(a: Any) -> Any:
    _check_weight(a.weight)
    return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]))


@register_fake("linear_dense_dx")
def _(a: Any) -> Any:
    _check_weight(a.weight)
    return a.dy.new_empty((*a.dy.shape[:-1], a.weight.shape[1]))


@constant_in_graphs
def _native_bfloat16() -> bool:
    return dtypes.native_bfloat16()


def _is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether the operators compute products of x and ``weight``: in float32, which x may be cast to, on the CPU."""
    return (
        x.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float16)
        and not (weight.requires_grad and torch.is_grad_enabled())
        and weight.is_contiguous()
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not _native_bfloat16()))
        and autocast_dtype("cpu") is None
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear`` in x's dtype, for a weight and a bias that may have another one.

    If x is float32, or bfloat16 on a CPU without bfloat16 arithmetic, a frozen weight of 16 bits is multiplied in
    float32 without a copy. In other cases, x and weight are cast to the wider of their dtypes.
    """
    if _is_served(x, weight):
        y: Tensor = torch.ops.qlora.linear_dense(x.float(), weight, None if bias is None else bias.float())
    else:
        wider = torch.promote_types(x.dtype, weight.dtype)
        y = functional.linear(x.to(wider), weight.to(wider), None if bias is None else bias.to(wider))
    return y if autocast_dtype(x.device.type) else y.to(x.dtype)


def multiply_into(dx: Tensor, dy: Tensor, weight: Tensor) -> None:
    """Writes dy · weight to ``dx``, for a float32 ``dy`` [M, N], as the gradient of ``linear`` would be."""
    if _is_served(dx, weight):
        dx.copy_(_kernel_dx(dy, weight))
    else:
        torch.mm(dy.to(dx.dtype), weight.to(dx.dtype), out=dx)
