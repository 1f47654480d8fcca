"""Linear layers of bitsandbytes in which our operators compute: ours for our code, and theirs for code that asks."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from ...form import Form
from ...nn import Linear4bit
from ...weight import NF4Weight


class FromBitsandbytes(Linear4bit):
    """What a layer of ours does differently in the place of one of bitsandbytes'."""

    # Without a compute dtype, a layer of bitsandbytes takes that of its first input.
    compute_type_is_set: bool

    def become(self, w4: NF4Weight, compute_dtype: torch.dtype | None) -> None:
        """Gives the state of a layer of ours to a module that was a ``bnb.nn.Linear4bit`` until now.

        Args:
            w4: its weight. compute_dtype: None for that of the first input.
        """
        for attribute in ("compute_dtype", "quant_state", "quant_storage"):
            vars(self).pop(attribute, None)
        self._set_form(Form(compute_dtype or w4.dtype, w4.block_size, w4.double_quant, w4.nested_block_size))
        self._register_packed("meta")
        self.set_weight(w4)
        self.compute_type_is_set = compute_dtype is not None

    def fused_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.compute_type_is_set:
            self.compute_dtype, self.compute_type_is_set = x.dtype, True
        return super().fused_forward(x, *args, **kwargs)

    def hide_scales(self) -> None:
        """Makes ``absmax`` a buffer: code that casts all parameters of one dimension, meaning norms, passes it by."""
        absmax = self._parameters.pop("absmax", None)
        if absmax is not None:
            self.register_buffer("absmax", absmax.detach())

    def set_packed(self, name: str, w4: NF4Weight) -> None:
        super().set_packed(name, w4)
        self.hide_scales()


class AdoptedLinear4bit(FromBitsandbytes, bnb.nn.Linear4bit):
    """A ``Linear4bit`` of ours in the place of a ``bnb.nn.Linear4bit``, of which it is an instance, too.

    So scripts that look for bitsandbytes' layers by their class find it. Its weight is uint8 [N, K/2] as in all our
    layers, and has no ``quant_state``: ``weight4bit`` has the scales, and ``dequantize()`` gives the decoded weight.
    """


# Layers of ours, and what stands for them in the place of bitsandbytes' layers.
ADOPTED: dict[type[Linear4bit], type[FromBitsandbytes]] = {Linear4bit: AdoptedLinear4bit}


def stand_in(layer: Linear4bit) -> None:
    """Makes a layer of ours, in place, one that is an instance of ``bnb.nn.Linear4bit``, too."""
    layer.__class__ = ADOPTED[type(layer)]
    assert isinstance(layer, FromBitsandbytes)
    layer.compute_type_is_set = True
    layer.hide_scales()
