"""4-bit layers with a merged adapter, and merge-aware training.

An adapter moves most weights by less than half a step between two codes. Rounding to the nearest code leaves such
weights unchanged, and the training is lost. With stochastic rounding the expected value is right: a fraction of the
weights takes the step, and the sums over a row hardly differ. The scales do not change, so a weight that does not move
keeps its code.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from ._library import LIBRARY, cuda_error
from .autograd import bias_gradient, in_order_of, linear_over, refuse_tangent
from .ops import MERGE_LORA_NF4
from .weight import TENSORS, Weight4bit, operands, quantize

# If rounding to the nearest codes retains this share of an update, it is used. Stochastic rounding has larger errors.
RETAINED_BY_NEAREST = 0.95
# The same for ``encode_like``. At the end of training, the loss is flat along the update: losing 15% of the update
# costs about 2% of its gain. Stochastic rounding of a large update has a 1.5 times larger error.
_RETAINED = 0.85

_NO_LORA = None, None, 1.0, 0.0, 0, None  # seed_tensor comes last


def seed_of(name: str) -> int:
    """The seed for rounding the weight ``name`` of a model.

    Merging an adapter twice gives the same model. The rounding errors of different weights are independent.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _check_shape(w4: Weight4bit, moved: Tensor) -> None:
    if moved.shape != w4.shape:
        raise ValueError(f"moved: expected shape {list(w4.shape)}, that of w4, got {list(moved.shape)}")


def with_update(w4: Weight4bit, moved: Tensor, seed: int = 0) -> Weight4bit:
    """Encodes ``moved``, the sum of W and an adapter's update, under the scales and offsets of W.

    The codes are rounded stochastically. The result is deterministic.

    Args:
        w4: W, [N, K] or a stack of such matrices [E, N, K].
        moved: float32, the same shape.
        seed: of the random numbers, from ``seed_of``. Matrix e of a stack uses ``seed_of(f"{seed}.{e}")``.

    Raises:
        ValueError: the shapes of ``moved`` and ``w4`` differ.
    """
    _check_shape(w4, moved)
    if moved.ndim == 3:
        parts = (with_update(w4.matrix(e), moved[e], seed_of(f"{seed}.{e}")) for e in range(len(moved)))
        return Weight4bit.stack([*parts])
    scales = w4.decoded_scales()
    scaled = w4.without_offsets(moved, scales).contiguous()
    packed = torch.ops.qlora.encode_nf4_stochastic(scaled, scales, w4.block_size, seed, w4.code)
    return w4.replace(packed=packed)


def with_nearest_codes(w4: Weight4bit, moved: Tensor) -> Weight4bit:
    """Encodes ``moved`` under the scales and offsets of W to the nearest codes; see ``with_update``."""
    _check_shape(w4, moved)
    if moved.ndim == 3:
        return Weight4bit.stack([with_nearest_codes(w4.matrix(e), moved[e]) for e in range(len(moved))])
    scales = w4.decoded_scales()
    scaled = w4.without_offsets(moved, scales).contiguous()
    packed = torch.ops.qlora.encode_nf4(scaled, scales, w4.block_size, code=w4.code)
    return w4.replace(packed=packed)


def retained_update(update: Tensor, before: Tensor, after: Tensor) -> tuple[float, float]:
    """⟨after - before, update⟩ and ‖update‖². Their quotient is the share of the update that the weights retain."""
    return ((after - before) * update).sum().item(), update.square().sum().item()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A weight with an update.

    Attributes:
        w4: the weight.
        retained, total: as in ``retained_update``, where the weight before is in the same form.
    """

    w4: Weight4bit
    retained: float
    total: float


def encode_like(base: Weight4bit, before: Tensor, moved: Tensor, seed: int = 0) -> Encoded:
    """Encodes ``moved``, the sum of W and an adapter's update, in the form of ``base``.

    Of three roundings, the result is the one with the smallest error among those that retain the update:

    - to the nearest codes under the scales of ``base``, which loses a small update if W lies on the codes;
    - to the nearest codes under new scales, for updates that exceed the old ones;
    - the update added to the values of ``base``, and rounded stochastically under its scales.

    Args:
        base: W, rounded to the nearest codes of that form.
        before: W, float32 [N, K].
        moved: float32, the same shape.
        seed: of the stochastic rounding, from ``seed_of``.
    """
    old, update = base.dequantize(torch.float32), moved - before
    found: list[tuple[float, Encoded]] = []
    for w4 in (with_update(base, old + update, seed), with_nearest_codes(base, moved), quantize(moved, base.form)):
        values = w4.dequantize(torch.float32)
        encoded = Encoded(w4, *retained_update(update, old, values))
        if not found or abs(encoded.retained - encoded.total) <= (1 - _RETAINED) * encoded.total:
            found.append(((values - moved).norm().item(), encoded))
    return min(found, key=lambda candidate: candidate[0])[1]


@torch.no_grad()
def merged_weight(w4: Weight4bit, lora_a: Tensor, lora_b: Tensor, scaling: float, seed: int = 0) -> Weight4bit:
    """W + scaling · B · A in 4 bits, summed in float32 and encoded by ``with_update``; also of stacks."""
    if len(w4.shape) == 3:
        matrices = ((w4.matrix(e), lora_a[e], lora_b[e], seed_of(f"{seed}.{e}")) for e in range(len(lora_a)))
        return Weight4bit.stack([merged_weight(w, a, b, scaling, own) for w, a, b, own in matrices])
    if w4.column_order is not None:
        lora_a = lora_a.index_select(-1, w4.column_order)
    arguments = operands(w4, w4, lora_a.float(), lora_b.float(), scaling, seed)
    return w4.replace(packed=torch.ops.qlora.merge_lora_nf4(*arguments))


def _merge_on_cuda(*args: Any) -> Tensor:
    """``merge_lora_nf4`` on CUDA, where it is a sequence of other operators."""
    a = MERGE_LORA_NF4(*args)
    # Of a weight with a column order, the adapter is in that order already.
    tensors = {name: getattr(a, name) for name in TENSORS if name != "column_order"}
    form = {name: getattr(a, name) for name in ("block_size", "nested_block_size", "code")}
    shape = torch.Size((a.lora_b.shape[0], a.lora_a.shape[1]))
    w4 = Weight4bit(**tensors, **form, shape=shape, dtype=torch.float32)
    moved = w4.dequantize(torch.float32).addmm_(a.lora_b, a.lora_a, alpha=a.scaling)
    return with_update(w4, moved, a.seed).packed


if cuda_error is None:
    LIBRARY.impl("merge_lora_nf4", _merge_on_cuda, "CUDA")


class MergedLinearNF4Function(torch.autograd.Function):
    """y = x · Ŵᵀ + bias with Ŵ = ``merged_weight``; A and B get the gradients of W + scaling · B · A.

    This is the straight-through estimator (Bengio et al., 2013): the backward ignores the rounding. ``apply`` takes
    x [..., K], offsets, bias [N] or None, lora_a [R, K], lora_b [N, R], scaling and Ŵ. If Ŵ is a stack, x is [S, K],
    offsets are those of ``grouped_linear_nf4``, and bias and adapters are stacked too; else offsets is None.
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
    ) -> Tensor:
        ctx.save_for_backward(x, offsets, lora_a, lora_b, merged)
        ctx.scaling = scaling
        linear, rows = linear_over(offsets)
        y: Tensor = linear.kernel(x, *rows, *operands(merged, merged, merged.shape[-2], bias, *_NO_LORA))
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
            dx = linear.dx(dy, *rows, *operands(merged, merged, x.shape[-1], *_NO_LORA))
        if needs_a or needs_b:
            da, db = linear.dlora(dy, x, *rows, lora_a, lora_b, ctx.scaling, 0.0, 0)
        dbias = bias_gradient(dy, offsets) if needs_bias else None
        return dx, None, dbias, da if needs_a else None, db if needs_b else None, None, None


def merged_linear_nf4(
    x: Tensor,
    merged: Weight4bit,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    offsets: Tensor | None = None,
) -> Tensor:
    """The layer, or the experts, over ``merged``, which is ``merged_weight(w4, lora_a, lora_b, scaling)``.

    Args:
        x: [..., K]; bias [N], lora_a [R, K] and lora_b [N, R] have the same dtype.
        offsets: of experts, the rows of x at which theirs end; see ``grouped_linear_nf4`` in docs/operators.md.

    Returns:
        y [..., N], which has first derivatives in x, bias, lora_a and lora_b.
    """
    if merged.column_order is not None:
        x, lora_a = in_order_of(merged.column_order, x, lora_a)
    y: Tensor = MergedLinearNF4Function.apply(  # type: ignore[no-untyped-call]
        x, offsets, bias, lora_a, lora_b, scaling, merged
    )
    return y
