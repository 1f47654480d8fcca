"""The layer whose adapter is merged into its 4-bit weight, as a differentiable operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import bias_gradient, in_order_of, last_arguments, linear_over, refuse_tangent
from .formats import EXACT
from .weight import Weight4bit, operands

_NO_LORA = None, None, 1.0, 0.0, 0, None  # seed_tensor comes last


class MergedLinearNF4Function(torch.autograd.Function):
    """y = x · Ŵᵀ + bias with Ŵ = ``merging.merged_weight``; A and B get the gradients of W + scaling · B · A.

    This is the straight-through estimator (Bengio et al., 2013): the backward ignores the rounding. ``apply`` takes
    x [..., K], offsets, bias [N] or None, lora_a [R, K], lora_b [N, R], scaling, Ŵ and activations. If Ŵ is a stack,
    x is [S, K], offsets are those of ``grouped_linear_nf4``, and bias and adapters are stacked too; else offsets is
    None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offsets: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        merged: Weight4bit,
        activations: str,
    ) -> Tensor:
        ctx.save_for_backward(x, offsets, lora_a, lora_b, merged)
        ctx.scaling, ctx.activations = scaling, activations
        linear, rows = linear_over(offsets)
        args = x, *rows, *operands(merged, merged, merged.shape[-2], bias, *_NO_LORA)
        y: Tensor = linear.kernel(*args, *last_arguments((), activations))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_tangent("the backward of a merge-aware layer", dy)
        x, offsets, lora_a, lora_b, merged = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        linear, rows = linear_over(offsets)
        dx = da = db = None
        if needs_x:
            args = dy, *rows, *operands(merged, merged, x.shape[-1], *_NO_LORA)
            dx = linear.dx(*args, *last_arguments((), ctx.activations))
        if needs_a or needs_b:
            da, db = linear.dlora(dy, x, *rows, lora_a, lora_b, ctx.scaling, 0.0, 0)
        dbias = bias_gradient(dy, offsets) if needs_bias else None
        return dx, None, dbias, da if needs_a else None, db if needs_b else None, None, None, None


def merged_linear_nf4(
    x: Tensor,
    merged: Weight4bit,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    offsets: Tensor | None = None,
    activations: str = EXACT,
) -> Tensor:
    """The layer, or the experts, over ``merged``, which is ``merging.merged_weight(w4, lora_a, lora_b, scaling)``.

    Args:
        x: [..., K]; bias [N], lora_a [R, K] and lora_b [N, R] have the same dtype.
        offsets: of experts, the rows of x at which theirs end; see ``grouped_linear_nf4`` in docs/operators.md.
        activations: as of ``linear_nf4``.

    Returns:
        y [..., N], which has first derivatives in x, bias, lora_a and lora_b.
    """
    if merged.column_order is not None:
        x, lora_a = in_order_of(merged.column_order, x, lora_a)
    y: Tensor = MergedLinearNF4Function.apply(  # type: ignore[no-untyped-call]
        x, offsets, bias, lora_a, lora_b, scaling, merged, activations
    )
    return y
