"""The weights of the layers of a loaded model, for targets that encode them anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...form import Form
from ...integrations.peft.merge import Over4bit
from ...merged import encode_like
from ...nn import Linear4bit
from ...weight import Weight4bit, quantize


def layers_by_name(model: Any) -> dict[str, Any]:
    """The modules of a model, which may have adapters, by their names without adapters."""
    return {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}


def before_and_after(layer: Any) -> tuple[Tensor, Tensor]:
    """The weight of a linear layer, and its sum with the adapters on a 4-bit one, float32 [N, K]."""
    if isinstance(layer, Over4bit):
        return layer.before_and_after()
    weight = layer.dequantize(torch.float32) if isinstance(layer, Linear4bit) else layer.weight.detach().float()
    return weight, weight


def stored_in(form: Form, layer: Any) -> Weight4bit | None:
    """The 4-bit weight of a layer, without adapters, if it is in that form."""
    packed = layer.layer4bit if isinstance(layer, Over4bit) else layer
    return packed.weight4bit if isinstance(packed, Linear4bit) and packed.form == form else None


def finished_in(form: Form, layers: Sequence[Any]) -> Weight4bit | None:
    """The joined rows of layers whose weights are in that form and need no rounding; else None.

    These are layers without an adapter, or with one that was trained merge-aware.
    """
    found = [w4 for layer in layers if (w4 := _finished(layer)) is not None and w4.form == form]
    if len(found) < len(layers):
        return None
    first = found[0]
    if len(found) == 1:
        return first
    if not all(torch.equal(first.tensors["scale_table"], w4.tensors["scale_table"]) for w4 in found):
        return None
    packed, absmax = (torch.cat([w4.tensors[name] for w4 in found]) for name in ("packed", "absmax"))
    return dataclasses.replace(first, packed=packed, absmax=absmax, shape=torch.Size((len(packed), *first.shape[1:])))


def _finished(layer: Any) -> Weight4bit | None:
    if not isinstance(layer, Over4bit):
        return layer.weight4bit if isinstance(layer, Linear4bit) else None
    names = layer.names_to_merge(None)
    return layer.trained_weight(names) if names else layer.layer4bit.packed_weight(layer.parameter_name)


class Encoder:
    """Encodes weights in a form, and adds up how much of the adapters' update they retain."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._retained = self._total = 0.0

    def __call__(self, before: Tensor, after: Tensor, stored: Weight4bit | None, seed: int) -> Weight4bit:
        """The weight ``after``; see ``encode_like``.

        Args:
            stored: ``before``, if it is in that form already.
        """
        base = quantize(before, self.form) if stored is None else stored
        if torch.equal(before, after):
            return base
        found = encode_like(base, before, after, seed)
        self._retained, self._total = self._retained + found.retained, self._total + found.total
        return found.w4

    def report(self) -> None:
        """Prints the share of the update that the codes retain."""
        if self._total:
            print(f"the codes retain {self._retained / self._total:.1%} of the adapter's update")
