"""Reads the weights of a loaded model with its adapters one at a time, and encodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_ext.form import Form
from qlora_ext.merging.codes import encode_like
from qlora_ext.merging.weights import ModelWeight, weights_of
from qlora_ext.nn import Linear4bit, TiedLinear4bit
from qlora_ext.weight import Weight4bit, quantize

# A weight without and with its adapters, float32, and its 4-bit weight, if it has one.
Read = tuple[Tensor, Tensor, Weight4bit | None]


def read(weight: ModelWeight) -> Read:
    """A weight. After merge-aware training, both tensors and the 4-bit weight are the trained one."""
    trained = weight.trained
    if trained is None:
        return *weight.before_and_after(), weight.stored
    values = weight.decoded(trained)
    return values, values, trained


def is_linear(weight: ModelWeight) -> bool:
    """Whether it is that of a linear layer. Heads tied to a 4-bit table do not count."""
    return isinstance(weight.module, Linear4bit | torch.nn.Linear) and not isinstance(weight.module, TiedLinear4bit)


def joined(form: Form, weights: Sequence[ModelWeight]) -> Weight4bit | None:
    """The joined rows of weights that are in that form and need no rounding; else None."""
    found = [w4 for weight in weights if (w4 := weight.trained) is not None and w4.form == form]
    if len(found) < len(weights):
        return None
    first = found[0]
    if len(found) == 1:
        return first
    if not all(torch.equal(first.tensors["scale_table"], w4.tensors["scale_table"]) for w4 in found):
        return None
    packed, absmax = (torch.cat([w4.tensors[name] for w4 in found]) for name in ("packed", "absmax"))
    return first.replace(packed=packed, absmax=absmax, shape=torch.Size((len(packed), *first.shape[1:])))


class MergedWeights:
    """The weights of a model that may have adapters, by their names in the dense model without adapters.

    Adapters on dense layers are merged at once, those on 4-bit layers when their weight is read.

    Args:
        model: loaded.
        calibrated: the merged weights of linear layers that are 4-bit already, by the name of the layer.
        dense: reads a dense weight more precisely than the model has it. Adapters must then be plain LoRA.
    """

    def __init__(
        self, model: Any, calibrated: Mapping[str, Weight4bit], dense: Callable[[str], Tensor] | None = None
    ) -> None:
        self._calibrated, self._dense = calibrated, dense
        self._weights = weights_of(model)
        if dense is None:
            for weight in self._weights.values():
                weight.merge_into_dense()
        self._last: tuple[str, Read] | None = None

    def read(self, name: str) -> Read:
        """A weight, on the CPU. The last one is kept, because several tensors of a file may come from it."""
        if self._last is None or self._last[0] != name:
            self._last = None
            before, after, w4 = self._read(name)
            before, after = before.cpu(), before.cpu() if after is before else after.cpu()
            self._last = name, (before, after, None if w4 is None else w4.to("cpu"))
        return self._last[1]

    def _read(self, name: str) -> Read:
        w4 = self._calibrated.get(name.removesuffix(".weight"))
        if w4 is not None:
            w = w4.dequantize(torch.float32)
            return w, w, w4
        weight = self._weights[name]
        if self._dense is None or weight.is_4bit:
            before, after, w4 = read(weight)
            return (before, after, w4) if weight.is_4bit else (after, after, None)
        before = after = self._dense(name)
        if weight.over_dense is not None:
            layer: Any = weight.over_dense
            after = sum((layer.get_delta_weight(adapter).float().cpu() for adapter in layer.active_adapters), before)
        return before, after, None


class Encoder:
    """Encodes weights in a form, and adds up how much of the adapters' update they retain."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.retained = self.total = 0.0

    def __call__(self, before: Tensor, after: Tensor, stored: Weight4bit | None, seed: int) -> Weight4bit:
        """The weight ``after``; see ``encode_like``.

        Args:
            stored: ``before``, if it is in that form already.
        """
        base = quantize(before, self.form) if stored is None else stored
        if torch.equal(before, after):
            return base
        found = encode_like(base, before, after, seed)
        self.retained, self.total = self.retained + found.retained, self.total + found.total
        return found.w4


def report(encoders: Iterable[Encoder]) -> None:
    """Prints the share of the update that the codes of several encoders retain."""
    found = [*encoders]
    retained, total = sum(encode.retained for encode in found), sum(encode.total for encode in found)
    if total:
        print(f"the codes retain {retained / total:.1%} of the adapter's update")
