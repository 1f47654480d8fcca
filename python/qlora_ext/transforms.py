"""``vmap`` rules for all operators, and error messages for derivatives of those that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import linear_dense
from ._library import LIBRARY, OPERATORS
from .arguments import arguments_of
from .autograd import below_autograd, refuse_tangent

assert linear_dense
_DIFFERENTIABLE = ("linear_nf4", "grouped_linear_nf4", "linear_dense")
# Operators whose first argument (x or dy) and outputs may have any number of leading dimensions.
_OF_TOKENS = ("linear_nf4", "linear_nf4_dx", "linear_dense", "linear_dense_dx")


def _without_derivative(name: str, operator: OpOverload) -> Callable[..., Any]:
    """The operator for the Autograd key. It rejects tangents at once, and gradients when a backward needs them."""
    kernel = below_autograd(operator)
    message = f"{name} has no derivative; torch.ops.qlora.linear_nf4, grouped_linear_nf4 and linear_dense have"

    def failing(output: Tensor) -> Tensor:
        if not output.is_floating_point():
            return output
        graph_end: Tensor = torch._C._functions.DelayedError(message, 1)(output.detach().requires_grad_())
        return graph_end

    def call(*args: Any) -> Any:
        refuse_tangent(name, *args)
        outputs = kernel(*args)
        if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
            return outputs
        return failing(outputs) if isinstance(outputs, Tensor) else tuple(map(failing, outputs))

    return call


def _vmap_rule(name: str, operator: OpOverload) -> Callable[..., Any]:
    """The vmap rule: one call for the tokens of all samples if nothing else is batched, else one call per sample."""
    named = arguments_of(operator)
    of_tokens = name.partition("_with_")[0] in _OF_TOKENS

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        a = named(*args)
        only_tokens = in_dims[0] is not None and not any(isinstance(dim, int) for dim in in_dims[1:])
        one_adapter = getattr(a, "adapter_of_row", None) is None
        if of_tokens and only_tokens and one_adapter and (getattr(a, "lora_a", None) is None or not a.dropout_p):
            outputs = operator(args[0].movedim(in_dims[0], 0), *args[1:])
        else:  # also with dropout, whose mask depends on an element's index within its sample
            samples = (
                operator(
                    *(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True))
                )
                for i in range(info.batch_size)
            )
            outputs = [*samples]
            if isinstance(outputs[0], Tensor):
                outputs = torch.stack(outputs)
            else:
                outputs = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)

    return rule


# torch crashes if a Python kernel gets a number that is not a dtype, so this operator has no Python kernel. Only its
# scales could have a gradient.
_WITH_DTYPE = ("dequantize_nf4",)

for _name in OPERATORS:
    _operator = getattr(torch.ops.qlora, _name).default
    if _name not in (*_DIFFERENTIABLE, *_WITH_DTYPE):
        LIBRARY.impl(_name, _without_derivative(_name, _operator), "Autograd")
    torch.library.register_vmap(f"qlora::{_name}", _vmap_rule(_name, _operator), lib=LIBRARY)
