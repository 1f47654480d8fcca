"""Shared by the tests of compiled and exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd


class CountingBackend:
    """A backend of torch.compile that runs the graphs unchanged, and counts those of the forward and the backward."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self._compile = aot_autograd(fw_compiler=self._compile_forward, bw_compiler=self._compile_backward)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return self._compile(graph, inputs)

    def _compile_forward(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.forward += 1
        return make_boxed_func(graph.forward)

    def _compile_backward(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.backward += 1
        return make_boxed_func(graph.forward)


def largest_error(results: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The maximum of ‖a - b‖ / ‖b‖ over pairs of tensors, which must have the same shape and dtype."""
    errors = []
    for a, b in zip(results, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.isfinite().all()
        norm = float(b.double().norm())
        assert norm > 0.0
        errors.append(float((a.double() - b.double()).norm()) / norm)
    return max(errors)
