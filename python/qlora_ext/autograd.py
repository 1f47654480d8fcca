"""Gradients of the fused layer and of experts: a ``torch.autograd.Function``, and the public ``linear_nf4``.

``below_autograd`` and ``differentiable`` serve every differentiable operator.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch._ops import OpOverload
from torch.autograd import forward_ad

from ._internal.shared_buffers import PackedTensors, owner_of
from ._library import LIBRARY
from .adapters import StackedAdapters, adapter_of_each_row, stack_adapters
from .arguments import arguments_of
from .form import Form
from .formats import EXACT, check_activations
from .ops import autocast_dtype, autocast_linear_nf4_args
from .weight_ops import FUNCTIONS, implements
from .weight_tensor import Numbers, Weight4bit, operands


def below_autograd(operator: OpOverload) -> Callable[..., Any]:
    """A function that calls the kernel directly.

    Without the guard, the dispatcher would enter Python a second time, which takes half the time of a small layer.
    """

    def kernel(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # Dynamo cannot trace the guard, and a traced call does not need it
            return operator(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return kernel


def has_tangent(args: tuple[Any, ...]) -> bool:
    """Whether forward-mode AD (``torch.func.jvp``, ``forward_ad.make_dual``) runs and reaches one of ``args``."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)


def no_tangent(operator: str) -> NoReturn:
    """Raises a NotImplementedError: ``operator`` has no forward-mode AD."""
    raise NotImplementedError(f"{operator}: forward-mode AD is not supported here; use reverse mode (backward)")


def refuse_tangent(operator: str, *args: Any) -> None:
    """Raises a NotImplementedError if one of ``args`` has a tangent, which the operator would drop."""
    if has_tangent(args):
        no_tangent(operator)


def refuse_second_derivative(args: tuple[Any, ...]) -> None:
    """Raises a NotImplementedError if ``torch.func.grad`` is itself differentiated: the result would be zeros."""

    def innermost(a: Tensor) -> Tensor:
        while functorch.is_functorch_wrapped_tensor(a):
            a = functorch.get_unwrapped(a)
        return a

    levels = [level.key() for level in functorch.get_interpreter_stack() or ()]
    gradients = levels.count(functorch.TransformType.Grad)
    around = forward_ad._current_level >= 0 or any(isinstance(a, Tensor) and innermost(a).requires_grad for a in args)
    if gradients > 1 or (gradients == 1 and around):
        raise NotImplementedError(
            "torch.func.grad: 4-bit layers have first derivatives only; do not differentiate the gradient, and detach "
            "tensors from outside that require a gradient"
        )


def differentiable(
    kernel: Callable[..., Tensor],
    function: type[torch.autograd.Function],
    with_tangent: Callable[[tuple[Any, ...]], Tensor],
) -> Callable[..., Tensor]:
    """An operator with its gradient. It builds a graph only if an argument requires a gradient.

    Args:
        kernel: from ``below_autograd``.
        function: defines the gradient.
        with_tangent: called instead, with all arguments, if one of them has a forward-mode tangent.
    """

    def call(*args: Any) -> Tensor:
        if has_tangent(args):
            return with_tangent(args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            y: Tensor
            if torch._C._are_functorch_transforms_active():
                refuse_second_derivative(args)
                # torch.func has one dispatch level per transform; the Function must run at the current level only.
                with enable_single_level_autograd_function():
                    y = super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
            else:
                y = function.apply(*args)
            return y
        return kernel(*args)

    return call


class LinearOperator:
    """A linear operator and its gradients, over a single weight or over experts.

    Attributes:
        arguments: the named tuple of its arguments, or of their gradients; an omitted one is None.
        given: the same, but an omitted argument takes the schema's default.
        kernel, with_h, dx, dx_with_g, dlora: the kernels. Together, they compute each low-rank product of LoRA once.
        differentiable: the operator with its gradient, see ``differentiable``.
    """

    def __init__(self, name: str) -> None:
        def kernel(suffix: str) -> Callable[..., Any]:
            return below_autograd(getattr(torch.ops.qlora, name + suffix).default)

        self.name, self.operator = name, getattr(torch.ops.qlora, name).default
        self.arguments, self.given = arguments_of(self.operator), arguments_of(self.operator, defaults=True)
        self.kernel, self.with_h = kernel(""), kernel("_with_h")
        self.dx, self.dx_with_g, self.dlora = kernel("_dx"), kernel("_dx_with_g"), kernel("_dlora")
        self.differentiable: Callable[..., Tensor]


_LINEAR, _EXPERTS = LinearOperator("linear_nf4"), LinearOperator("grouped_linear_nf4")


def last_arguments(adapters: tuple[Any, ...], activations: str) -> tuple[Any, ...]:
    """The last arguments of an operator: those that describe several adapters, () for one, and ``activations``.

    Defaults at the end are left out, because each argument costs a small layer time.
    """
    return adapters if activations == EXACT else (*(adapters or (None, None, None, None, 0)), activations)


def linear_over(offsets: Tensor | None) -> tuple[LinearOperator, tuple[Tensor, ...]]:
    """The operator over a single weight or over experts, and the argument that only the latter has."""
    return (_LINEAR, ()) if offsets is None else (_EXPERTS, (offsets,))


def bias_gradient(dy: Tensor, offsets: Tensor | None) -> Tensor:
    """The sum of all rows of dy [..., N], or [E, N], those of each expert's rows."""
    if offsets is None:
        return dy.reshape(-1, dy.shape[-1]).sum(0)
    (s, n), (experts,) = dy.shape, offsets.shape
    # The gradient of lora_b, if x, lora_a and scaling are ones.
    ones, lora_a, lora_b = dy.new_ones(s, 1), dy.new_ones(experts, 1, 1), dy.new_zeros(experts, n, 1)
    sums: Tensor = torch.ops.qlora.grouped_linear_nf4_dlora.default(dy, ones, offsets, lora_a, lora_b, 1.0)[1]
    return sums.squeeze(-1)


def _forward(ctx: Any, linear: LinearOperator, args: tuple[Any, ...]) -> Tensor:
    a, needs = linear.given(*args), linear.arguments(*ctx.needs_input_grad)
    y: Tensor
    y, h = linear.with_h(*args) if needs.lora_a or needs.lora_b else (linear.kernel(*args), None)
    ctx.owner = owner_of(a.packed)
    packed = a.packed, a.absmax, a.nested_absmax, a.nested_offset, a.scale_table, a.block_offsets, a.offset_scale
    lora = a.lora_a, a.lora_b, a.seed_tensor, a.adapter_of_row, a.rank_offsets, a.scalings, a.seeds
    x, offsets = None if h is None else a.x, getattr(a, "offsets", None)
    ctx.save_for_backward(x, h, offsets, *lora, *(packed if ctx.owner is None else ()))
    ctx.numbers = a.block_size, a.nested_block_size, a.code
    ctx.in_features = a.x.shape[-1]
    ctx.lora_numbers, ctx.max_rank = (a.scaling, a.dropout_p, a.seed), a.max_rank
    ctx.activations = a.activations
    return y


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, h, offsets, lora_a, lora_b, seed_tensor, *others = ctx.saved_tensors
    linear, rows = linear_over(offsets)
    refuse_tangent(f"the backward of {linear.name}", dy)
    needs = linear.arguments(*ctx.needs_input_grad)
    lora = lora_a, lora_b, *ctx.lora_numbers, seed_tensor
    adapters = () if others[0] is None else (*others[:4], ctx.max_rank)
    dx = g = da = db = None
    if needs.x:
        loan = contextlib.nullcontext(PackedTensors(*others[4:])) if ctx.owner is None else ctx.owner()
        with loan as packed:
            args = dy, *rows, *operands(packed, Numbers(*ctx.numbers), ctx.in_features, *lora)
            args += last_arguments(adapters, ctx.activations)
            dx, g = (linear.dx(*args), None) if h is None else linear.dx_with_g(*args)
    if h is not None:
        da, db = linear.dlora(dy, x, *rows, *lora, h, g, *adapters)
    gradients = linear.arguments(
        x=dx,
        bias=bias_gradient(dy, offsets) if needs.bias else None,
        lora_a=da if needs.lora_a else None,
        lora_b=db if needs.lora_b else None,
    )
    return (*gradients[: len(ctx.needs_input_grad)],)


class LinearNF4Function(torch.autograd.Function):
    """y = x · Wᵀ + scaling · dropout(x) · Aᵀ · Bᵀ + bias over a packed, frozen W (QLoRA, Dettmers et al., 2023).

    ``apply`` takes the arguments of ``torch.ops.qlora.linear_nf4`` in its order: x [..., K], packed, absmax,
    nested_absmax, nested_offset, block_size, nested_block_size, out_features N, bias [N], lora_a [R, K],
    lora_b [N, R], scaling, dropout_p, seed, and optionally seed_tensor (0-dim int64, on x's device), code, scale_table,
    block_offsets and offset_scale; of several adapters adapter_of_row, rank_offsets, scalings, seeds and max_rank
    (``adapters.py``); and activations, which apply to dx too.
    Gradients reach x, bias, lora_a and lora_b. The backward saves references to the packed state (or to its owner, see
    ``_internal/shared_buffers.py``), the adapters and the seed; and, if adapters are trained, x and
    h = scaling · dropout(x) · Aᵀ [..., R]. It saves no dequantized weight and no dropout mask: it draws the mask again
    from the seed. Under autocast, x, bias and adapters are cast.

    Raises:
        NotImplementedError: forward-mode AD, which Dynamo cannot trace in a Function. The operator supports it for x
            and bias.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        device_type = args[0].device.type
        if autocast_dtype(device_type) is not None:  # saved tensors must have the dtype that dy will have
            args = (*autocast_linear_nf4_args(device_type, args),)
        return _forward(ctx, _LINEAR, args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, dy)


class _OverExperts(LinearNF4Function):
    """The same over experts. ``apply`` takes the arguments of ``torch.ops.qlora.grouped_linear_nf4``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _forward(ctx, _EXPERTS, args)


def _with_tangent(args: tuple[Any, ...]) -> Tensor:
    """The output with its tangent. The layer is linear in x and bias, so its tangent is the layer of their tangents."""
    duals = [forward_ad.unpack_dual(a) if isinstance(a, Tensor) else (a, None) for a in args]
    values, tangents = zip(*duals, strict=True)
    primals, tangents = _LINEAR.given(*values), _LINEAR.arguments(*tangents)
    for name, tangent in tangents._asdict().items():
        if tangent is not None and name not in ("x", "bias"):
            raise NotImplementedError(f"{name}: linear_nf4 has forward-mode derivatives for x and bias only")
    y = _LINEAR.differentiable(*primals)
    if tangents.x is None:
        assert tangents.bias is not None  # at least one tangent exists
        tangent = torch.zeros_like(y) + tangents.bias
    else:
        tangent = _LINEAR.differentiable(*primals._replace(x=tangents.x, bias=tangents.bias))
    dual: Tensor = forward_ad.make_dual(y, tangent)
    return dual


_LINEAR.differentiable = differentiable(_LINEAR.kernel, LinearNF4Function, _with_tangent)
_EXPERTS.differentiable = differentiable(_EXPERTS.kernel, _OverExperts, lambda args: no_tangent(_EXPERTS.name))
for _linear in (_LINEAR, _EXPERTS):
    LIBRARY.impl(_linear.name, _linear.differentiable, "Autograd")


def call_linear(
    x: Tensor,
    w: Weight4bit | PackedTensors,
    form: Weight4bit | Form,
    *others: Any,
    adapters: tuple[Any, ...] = (),
    offsets: Tensor | None = None,
    activations: str = EXACT,
) -> Tensor:
    """``linear_nf4`` of ``torch.ops.qlora``, or ``grouped_linear_nf4`` of experts, without the dispatcher if possible.

    Args:
        w, form: see ``operands``.
        others: out_features, bias, lora_a, lora_b, scaling, dropout_p, seed and seed_tensor.
        adapters: the operator's arguments that describe the adapters of a call with several.
        offsets: of experts.
    """
    linear, rows = linear_over(offsets)
    args = x, *rows, *operands(w, form, *others), *last_arguments(adapters, activations)
    by_dispatcher = torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active()
    if by_dispatcher or torch._C._is_any_autocast_enabled():
        y: Tensor = linear.operator(*args)
        return y
    return linear.differentiable(*args)


@implements(FUNCTIONS, torch.nn.functional.linear)
def _functional_linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Weight4bit) or isinstance(x, Weight4bit) or weight.ndim != 2:
        return NotImplemented
    if weight.column_order is not None:
        x, _ = in_order_of(weight.column_order, x, None)
    return call_linear(x, weight, weight, weight.shape[0], bias, None, None, 1.0, 0.0, 0, None)


def in_order_of(column_order: Tensor, x: Tensor, lora_a: Any) -> tuple[Tensor, Any]:
    """x [..., K] and one or several adapters, with their columns in the order in which a weight stores its own.

    Operators reject tensors with another number of columns, which are left as they are.
    """
    if isinstance(lora_a, StackedAdapters):
        x, a = in_order_of(column_order, x, lora_a.lora_a)
        return x, lora_a._replace(lora_a=a)

    def ordered(t: Tensor) -> Tensor:
        return t.index_select(-1, column_order) if t.shape[-1] == len(column_order) else t

    return ordered(x), None if lora_a is None else ordered(lora_a)


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 [], from the device's generator: ``torch.manual_seed`` and checkpointing reproduce it.

    The seed stays on the device: the host does not wait for it, compiled graphs do not break, and captured CUDA graphs
    draw a new seed at each replay.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _several(
    x: Tensor, lora_a: Any, lora_b: Any, scaling: Any, seed: Any, adapter_of_row: Tensor | None
) -> tuple[Tensor, Tensor, float, Any, tuple[Any, ...]]:
    """lora_a, lora_b, scaling and seed as the operator takes them for several adapters, and its last arguments."""
    if not isinstance(lora_a, list | tuple):
        raise TypeError(f"lora_a: expected a list with adapter_of_row, got {type(lora_a).__name__}")
    if isinstance(lora_a, StackedAdapters):
        if lora_b is not None or scaling != 1.0 or isinstance(seed, list | tuple):
            raise ValueError("lora_b, scaling, seed: StackedAdapters has them already; leave them out")
        stacked = lora_a
    else:
        stacked = stack_adapters(lora_a, lora_b, scaling, seed if isinstance(seed, list | tuple) else None)
    if stacked.seeds is not None:
        if isinstance(seed, int | Tensor):
            raise ValueError(f"seed: expected None, since each adapter has a seed, got {reprlib.repr(seed)}")
        seed = 0
    last = stacked.arguments(adapter_of_each_row(adapter_of_row, x))
    return stacked.lora_a, stacked.lora_b, 1.0, seed, last


def linear_nf4(
    x: Tensor,
    w4: Weight4bit,
    bias: Tensor | None = None,
    lora_a: Tensor | Sequence[Tensor] | StackedAdapters | None = None,
    lora_b: Tensor | Sequence[Tensor] | None = None,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | Sequence[int] | None = None,
    adapter_of_row: Tensor | None = None,
    activations: str = EXACT,
) -> Tensor:
    """The fused QLoRA layer: y = x · dequantize(w4)ᵀ + scaling · dropout(x) · lora_aᵀ · lora_bᵀ + bias.

    Args:
        x: [..., K]; float32, bfloat16 or float16 (float64 on the CPU). Any leading dimensions, any strides.
        w4: the frozen weight, of shape [N, K].
        bias: [N], dtype of x.
        lora_a, lora_b: [R, K] and [N, R], dtype of x; both or neither.
        scaling: lora_alpha / R.
        dropout_p: probability of dropping an element of x on the LoRA branch, 0 to 1.
        seed: of dropout's Philox stream: an integer of 64 bits, or a 0-dim int64 tensor on x's device that holds it.
            With None, it is drawn from that device's generator if ``dropout_p`` > 0.
        adapter_of_row: for several adapters in one call: which of them each row of x uses, -1 for none. lora_a,
            lora_b, and optionally scaling and seed, are then lists with one entry per adapter, whose ranks may differ;
            or lora_a is what ``adapters.stack_adapters`` has made of them. Integers, int32 without a copy, in the
            shape of x's leading dimensions, of the first of them (x [B, S, K]: [B]), or flat. The base weight is read
            once. A row has the bits of the same call with its adapter alone, and dropout's mask is that
            of this call. An adapter's gradients are those of a call with its rows alone, but for the mask.
            docs/operators.md says where CUDA differs: it cannot reject numbers of adapters that do not exist.
        activations: "int8" rounds what meets the weight, x and in the backward dy times the scales, to int8 with a
            scale per token and 64 columns, which is faster on a CPU. LoRA and bias take the exact x and dy. CUDA, and
            layers whose in_features are no multiple of 64, compute exactly. docs/operators.md has the error bound.

    Returns:
        y [..., N] in x's dtype, differentiable in x, bias, lora_a and lora_b. Under autocast the dense arguments
        take the autocast dtype first.

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit; the message names it, what was expected and what
            was given.

    Example:
        >>> w4 = qlora_ext.quantize_nf4(torch.randn(48, 64))
        >>> x = torch.randn(3, 64)
        >>> a, b = torch.randn(8, 64, requires_grad=True), torch.zeros(48, 8, requires_grad=True)
        >>> y = qlora_ext.linear_nf4(x, w4, lora_a=a, lora_b=b, scaling=2.0)
        >>> y.sum().backward()
        >>> y.shape, b.grad.shape
        (torch.Size([3, 48]), torch.Size([48, 8]))
    """
    if not isinstance(w4, Weight4bit):
        raise TypeError(f"w4: expected an NF4Weight (see qlora_ext.quantize_nf4), got {type(w4).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if len(w4.shape) != 2:
        raise ValueError(f"w4: expected a weight of shape [N, K], got {list(w4.shape)}")
    try:
        fits = x.ndim > 0 and x.shape[-1] == w4.shape[1]
    except RuntimeError:  # a nested tensor has no shape
        fits = False
    if not fits:
        got = "a nested tensor" if x.is_nested else list(x.shape)
        raise ValueError(f"x: expected shape [..., {w4.shape[1]}] (in_features of w4), got {got}")
    adapters: tuple[Any, ...] = ()
    if isinstance(lora_a, list | tuple) or adapter_of_row is not None:
        lora_a, lora_b, scaling, seed, adapters = _several(x, lora_a, lora_b, scaling, seed, adapter_of_row)
    if seed is None:
        try:
            drops = dropout_p > 0.0 and lora_a is not None
        except TypeError:
            raise TypeError(f"dropout_p: expected a probability from 0 to 1, got {reprlib.repr(dropout_p)}") from None
        seed = draw_seed(x.device) if drops else 0
    if not isinstance(seed, Tensor):
        fits = isinstance(seed, int | torch.SymInt) and -(2**63) <= seed < 2**63
    else:
        fits = seed.dtype == torch.int64 and seed.ndim == 0
    if not fits:
        raise ValueError(
            "seed: expected an integer of 64 bits, from -2^63 to 2^63 - 1, or a 0-dim int64 tensor, "
            f"got {reprlib.repr(seed)}"
        )
    seed, seed_tensor = (0, seed) if isinstance(seed, Tensor) else (seed, None)
    if w4.column_order is not None:
        x, lora_a = in_order_of(w4.column_order, x, lora_a)
    check_activations(activations)
    lora = lora_a, lora_b, scaling, dropout_p, seed, seed_tensor
    return call_linear(x, w4, w4, w4.shape[0], bias, *lora, adapters=adapters, activations=activations)
