"""Shapes and gradients of the grouped operators, which compute the linear layers of a mixture of experts.

``torch.ops.qlora.grouped_linear_nf4``, its gradients ``_dx`` and ``_dlora``, and the variants ``_with_h`` and
``_with_g`` apply a stack of 4-bit weights, each to its own rows::

    y[i] = x[i] · dequantize(w[e])ᵀ + scaling · dropout(x)[i] · lora_a[e]ᵀ · lora_b[e]ᵀ + bias[e]

with e the expert of row i. The signatures are in ``cpp/ops/schema.cpp``:

    x: [S, K], sorted by expert.
    offsets: [E] int64 on x's device: the rows of expert e end at ``offsets[e]``. Rows after the last offset give zeros.
        On CUDA the host never reads the offsets, so it does not wait, and a captured graph may be replayed with other
        offsets. Wrong offsets are therefore clamped on CUDA, each to the range from the previous one to S, so that no
        access is out of bounds. The CPU raises a ValueError.
    packed, absmax, nested_absmax, nested_offset: of E stacked weights [N, K]: uint8 [E, N, K/2], [E, blocks], and
        float32 [E, nested blocks] and [E].
    block_size, nested_block_size: of those weights.
    out_features, in_features: N, K.
    bias: [E, N], in x's dtype.
    lora_a, lora_b: [E, R, K] and [E, N, R], in x's dtype; both or neither.
    dropout_p, seed, seed_tensor: as in ``linear_nf4``.
    code, scale_table, block_offsets, offset_scale: of those weights, the tensors stacked.
    adapter_of_row, rank_offsets, scalings, seeds, max_rank: of several adapters per call (CPU only), as in
        ``linear_nf4``. lora_a and lora_b are then [E, sum of ranks, K] and [E, N, sum of ranks]. The slices of all
        experts are divided alike (``adapters.py``).

y is [S, N] in x's dtype, differentiable in x, bias, lora_a and lora_b; the gradients of an expert without rows are
zeros. h = scaling · dropout(x) · lora_aᵀ and g = scaling · dy · lora_b are [S, R] in x's dtype, or
[S, max_rank]. ``_dlora`` computes them unless they are given.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._internal.loans import lender_of
from ._library import LIBRARY
from .arguments import arguments_of
from .autograd import LinearKernels, differentiable, no_tangent, refuse_tangent
from .formats import check_block_sizes, check_code

_GROUPED = arguments_of(torch.ops.qlora.grouped_linear_nf4.default)
_given = arguments_of(torch.ops.qlora.grouped_linear_nf4.default, defaults=True)
_given_dx = arguments_of(torch.ops.qlora.grouped_linear_nf4_dx.default, defaults=True)
_given_dlora = arguments_of(torch.ops.qlora.grouped_linear_nf4_dlora.default, defaults=True)
_kernels = LinearKernels("grouped_linear_nf4")


def expert_sums(dy: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each expert's rows, [E, N]. It equals the gradient of lora_b if x, lora_a and scaling are ones."""
    (s, n), (experts,) = dy.shape, offsets.shape
    ones, lora_a, lora_b = dy.new_ones(s, 1), dy.new_ones(experts, 1, 1), dy.new_zeros(experts, n, 1)
    sums: Tensor = torch.ops.qlora.grouped_linear_nf4_dlora.default(dy, ones, offsets, lora_a, lora_b, 1.0)[1]
    return sums.squeeze(-1)


class _GroupedLinearNF4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        a, needs = _given(*args), _GROUPED(*ctx.needs_input_grad)
        y, h = _kernels.forward(args, needs)
        x = None if h is None else a.x
        packed = a.packed, a.absmax, a.nested_absmax, a.nested_offset, a.scale_table, a.block_offsets, a.offset_scale
        ctx.lender = lender_of(a.packed)
        saved = packed if ctx.lender is None else ()
        adapters = a.adapter_of_row, a.rank_offsets, a.scalings, a.seeds
        ctx.save_for_backward(x, h, a.lora_a, a.lora_b, a.offsets, a.seed_tensor, *adapters, *saved)
        ctx.block_sizes, ctx.code = (a.block_size, a.nested_block_size), a.code
        ctx.in_features = a.x.shape[-1]
        ctx.lora_numbers, ctx.max_rank = (a.scaling, a.dropout_p, a.seed), a.max_rank
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_tangent("the backward of grouped_linear_nf4", dy)
        x, h, lora_a, lora_b, offsets, seed_tensor, *others = ctx.saved_tensors
        packed = others[4:]
        adapters = () if others[0] is None else (*others[:4], ctx.max_rank)
        lora = lora_a, lora_b, *ctx.lora_numbers, seed_tensor
        needs = _GROUPED(*ctx.needs_input_grad)
        loan = contextlib.nullcontext(packed) if ctx.lender is None or not needs.x else ctx.lender()
        with loan as packed:
            sizes = *ctx.block_sizes, ctx.in_features
            dx_args = dy, offsets, *packed[:4], *sizes, *lora, ctx.code, *packed[4:7]
            dx, da, db = _kernels.backward(needs, h, dx_args, (dy, x, offsets, *lora), adapters)
        dbias = expert_sums(dy, offsets) if needs.bias else None
        return (*_GROUPED(x=dx, bias=dbias, lora_a=da, lora_b=db)[: len(ctx.needs_input_grad)],)


_differentiable = differentiable(_kernels.alone, _GroupedLinearNF4, lambda args: no_tangent("grouped_linear_nf4"))
LIBRARY.impl("grouped_linear_nf4", _differentiable, "Autograd")


def _max_rank(a: Any) -> int | None:
    """As ``ops.max_rank_of``. Raises a ValueError too if several adapters are on a CUDA device."""
    if a.adapter_of_row is not None and a.adapter_of_row.is_cuda:
        raise ValueError("adapter_of_row: several adapters of experts per call run on the CPU only")
    return ops.max_rank_of(a)


def _fake_grouped(*args: Any) -> Tensor:
    a = _given(*args)
    ops.refuse_onnx()
    check_block_sizes(a.block_size, a.nested_block_size)
    check_code(a.code)
    ops.check_lora_numbers(a.scaling, a.dropout_p)
    ops.check_seed_tensor(a.seed_tensor)
    ops.check_one_device("grouped_linear_nf4", *args)
    _max_rank(a)
    y: Tensor = a.x.new_empty((a.x.shape[0], a.out_features))
    return y


torch.library.register_fake("qlora::grouped_linear_nf4", _fake_grouped)


@torch.library.register_fake("qlora::grouped_linear_nf4_with_h")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    a = _given(*args)
    return _fake_grouped(*args), ops.low_rank_like(a.x, a.lora_a, _max_rank(a))


def _fake_grouped_dx(*args: Any) -> Tensor:
    a = _given_dx(*args)
    check_block_sizes(a.block_size, a.nested_block_size)
    check_code(a.code)
    ops.check_lora_numbers(a.scaling, a.dropout_p)
    ops.check_seed_tensor(a.seed_tensor)
    ops.check_one_device("grouped_linear_nf4_dx", *args)
    _max_rank(a)
    dx: Tensor = a.dy.new_empty((a.dy.shape[0], a.in_features))
    return dx


torch.library.register_fake("qlora::grouped_linear_nf4_dx", _fake_grouped_dx)


@torch.library.register_fake("qlora::grouped_linear_nf4_dx_with_g")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    a = _given_dx(*args)
    return _fake_grouped_dx(*args), ops.low_rank_like(a.dy, a.lora_a, _max_rank(a))


@torch.library.register_fake("qlora::grouped_linear_nf4_dlora")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    a = _given_dlora(*args)
    ops.check_lora_numbers(a.scaling, a.dropout_p)
    ops.check_seed_tensor(a.seed_tensor)
    ops.check_one_device("grouped_linear_nf4_dlora", *args)
    _max_rank(a)
    return a.lora_a.new_empty(a.lora_a.shape), a.lora_b.new_empty(a.lora_b.shape)
