"""The weights of the layers of a loaded model, for targets that encode them anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from qlora_ext.form import Form
from qlora_ext.merging.codes import encode_like
from qlora_ext.merging.layers import Over4bit
from qlora_ext.nn import Experts4bit, Linear4bit, Packed4bit, TiedLinear4bit
from qlora_ext.weight import Weight4bit, quantize


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
    return first.replace(packed=packed, absmax=absmax, shape=torch.Size((len(packed), *first.shape[1:])))


def _finished(layer: Any) -> Weight4bit | None:
    if not isinstance(layer, Over4bit):
        return layer.weight4bit if isinstance(layer, Linear4bit) else None
    names = layer.names_to_merge(None)
    return layer.trained_weight(names) if names else layer.layer4bit.packed_weight(layer.parameter_name)


def is_linear(layer: Any) -> bool:
    """Whether a module, with or without adapters, is a linear layer. Heads tied to a 4-bit table do not count."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return isinstance(base, (Linear4bit, torch.nn.Linear)) and not isinstance(base, TiedLinear4bit)


def scaled_by(layer: Any) -> Weight4bit | None:
    """The 4-bit weight of a linear layer. After merge-aware training, it includes the adapter."""
    if isinstance(layer, Over4bit):
        trained = layer.trained_weight(layer.names_to_merge(None))
        return layer.layer4bit.packed_weight(layer.parameter_name) if trained is None else trained
    return layer.weight4bit if isinstance(layer, Linear4bit) else None


@dataclasses.dataclass(frozen=True)
class Stack:
    """The stacked weights [E, N, K] of experts, of one kind.

    Attributes:
        owner: the layer with the adapter on them, or the 4-bit or dense experts.
        layout: 4-bit experts of that shape, which may be on the meta device.
        parameter: the name of the weights in them.
    """

    owner: Any
    layout: Experts4bit
    parameter: str

    @property
    def is_4bit(self) -> bool:
        """Whether the weights in the model are 4-bit."""
        return isinstance(self.owner, (Over4bit, Experts4bit))

    @property
    def _trained(self) -> Weight4bit | None:
        """The weights with their adapter, if it was trained merge-aware."""
        return self.owner.trained_weight(self.owner.names_to_merge(None)) if isinstance(self.owner, Over4bit) else None

    def before_and_after(self) -> tuple[Tensor, Tensor]:
        """The weights, and their sums with the adapters on 4-bit ones, float32 [E, N, K].

        Both are the trained weights after merge-aware training.
        """
        trained = self._trained
        if trained is not None:
            values = trained.dequantize(torch.float32)
            return values, values
        if isinstance(self.owner, Over4bit):
            before, after = self.owner.before_and_after()
        elif isinstance(self.owner, Experts4bit):
            before = after = self.owner.dequantize(self.parameter, torch.float32)
        else:
            before = after = getattr(self.owner, self.parameter).detach().float()
        return self.layout.as_quantized(before), self.layout.as_quantized(after)

    def stored_in(self, form: Form) -> Weight4bit | None:
        """The 4-bit weights without adapters, or those of merge-aware training, if they are in that form."""
        trained = self._trained
        if trained is not None:
            return trained if trained.form == form else None
        packed = self.owner.layer4bit if isinstance(self.owner, Over4bit) else self.owner
        if not isinstance(packed, Packed4bit) or packed.form != form:
            return None
        return packed.packed_weight(self.parameter)


def stacks_in(model: Any, experts: Mapping[str, Experts4bit]) -> dict[str, Stack]:
    """The stacks of a loaded model, which may have adapters, by the names of the weights.

    Args:
        experts: 4-bit modules of the shapes of those in the model, by name.
    """
    owners = {}
    for name, module in layers_by_name(model).items():
        path = name.replace(".base_layer", "")
        if isinstance(module, Over4bit):
            owners[f"{path}.{module.parameter_name}"] = module
        elif path in experts:
            for parameter in experts[path].packed_shapes:
                if hasattr(module, parameter):  # not the adapters around it
                    owners.setdefault(f"{path}.{parameter}", module)
    return {
        f"{path}.{parameter}": Stack(owners[f"{path}.{parameter}"], layout, parameter)
        for path, layout in experts.items()
        for parameter in layout.packed_shapes
    }


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
