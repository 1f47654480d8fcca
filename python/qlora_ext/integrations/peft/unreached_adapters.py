"""Finds adapters that a backward pass did not reach."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def _trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every trainable parameter with the name of its adapter layer, or its own name outside of adapter layers."""
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inner_first = sorted(layers, key=len, reverse=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield next((layer for layer in inner_first if name.startswith(f"{layer}.")), name), p


def inert_adapters(model: nn.Module) -> list[str]:
    """The adapters of a PEFT model without a gradient from the last backward pass: they learn nothing.

    Call it after the first ``backward()`` of a training run. An adapter is inert if its layer is never called, or if a
    method of PEFT does not work over the base. Experts to which no token of the batch was routed are included.

    Args:
        model: a model with adapters, whose trainable parameters have the gradients of a step.

    Returns:
        The full names of adapter layers in which every trainable parameter has no gradient or a gradient of 0, and of
        such parameters outside of adapter layers. In LoRA's first step the gradients of A are 0 because B is 0, but
        those of B are not, so the layer is not listed.

    Example:
        >>> loss = model(**batch).loss  # doctest: +SKIP
        >>> loss.backward()  # doctest: +SKIP
        >>> inert_adapters(model)  # doctest: +SKIP
        []
    """
    moved: dict[str, bool] = {}
    for name, p in _trainable(model):
        moved[name] = moved.get(name, False) or (p.grad is not None and bool(p.grad.any()))
    return [name for name, has_gradient in moved.items() if not has_gradient]
