"""Linear layers of bitsandbytes in which our operators compute: ours for our code, and theirs for code that asks."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from ...nn import SCALES, Linear4bit
from ...weight import NF4Weight, Weight4bit


def _packed_state(w4: NF4Weight, prefix: str) -> dict[str, Tensor]:
    """The packed state of a layer with this weight, as in the ``state_dict`` of one of ours."""
    tensors = {"weight": w4.packed, **{scale: getattr(w4, scale) for scale in SCALES}}
    return {prefix + name: t for name, t in tensors.items() if t is not None}


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
        self._set_form(w4.form, compute_dtype or w4.dtype)
        self._register_packed("meta")
        self.set_weight(w4)
        self.compute_type_is_set = compute_dtype is not None

    @property
    def quant_state(self) -> QuantState | None:
        """The scales as bitsandbytes has them, in the memory of this layer's own; None while they are on "meta".

        With ``weight.reshape(-1, 1)`` they are what bitsandbytes' functions take.
        """
        if self.absmax.is_meta:
            return None
        tensors = self.weight4bit.to_bitsandbytes("weight")
        del tensors["weight"]
        state = QuantState.from_dict(tensors, device=self.absmax.device)
        if state.nested:
            state.offset = self.nested_offset
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = f"{prefix}weight"
        if any(key.startswith(f"{weight}.quant_state.") for key in state_dict):
            try:
                w4 = self._read(state_dict, prefix)
            except (KeyError, ValueError) as error:  # refused even where the load is not strict
                args[-1].append(error.args[0])
                return
            others = {key: t for key, t in state_dict.items() if not key.startswith(f"{weight}.")}
            state_dict = others | _packed_state(w4, prefix)
            self.weight_dtype = w4.dtype
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _read(self, state_dict: dict[str, Any], prefix: str) -> NF4Weight:
        """This layer's weight in a state of bitsandbytes.

        Raises:
            KeyError, ValueError: there is none, or it has another form.
        """
        w4 = NF4Weight.from_bitsandbytes(state_dict, f"{prefix}weight")
        expected = self.packed_shapes["weight"]
        if tuple(w4.shape) != expected:
            raise ValueError(f"{prefix}weight: expected shape {list(expected)}, got {list(w4.shape)}")
        self.check_form(_packed_state(w4, prefix), prefix)
        return w4

    def fused_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.compute_type_is_set:
            self.compute_dtype, self.compute_type_is_set = x.dtype, True
        return super().fused_forward(x, *args, **kwargs)

    def hide_scales(self) -> None:
        """Makes ``absmax`` a buffer: code that casts all parameters of one dimension, meaning norms, passes it by."""
        absmax = self._parameters.pop("absmax", None)
        if absmax is not None:
            self.register_buffer("absmax", absmax.detach())

    def set_packed(self, name: str, w4: Weight4bit) -> None:
        super().set_packed(name, w4)
        self.hide_scales()


class AdoptedLinear4bit(FromBitsandbytes, bnb.nn.Linear4bit):
    """A ``Linear4bit`` of ours in the place of a ``bnb.nn.Linear4bit``, of which it is an instance, too.

    So scripts that look for bitsandbytes' layers by their class find it. Its weight is uint8 [N, K/2] as in all our
    layers, and a plain parameter without a ``quant_state``: the layer has that, and ``dequantize()`` gives the decoded
    weight. It loads bitsandbytes' state as well as its own, and its own is what ``state_dict()`` gives.
    """


# Layers of ours, and what stands for them in the place of bitsandbytes' layers.
ADOPTED: dict[type[Linear4bit], type[FromBitsandbytes]] = {Linear4bit: AdoptedLinear4bit}


def stand_in(layer: Linear4bit) -> None:
    """Makes a layer of ours, in place, one that is an instance of ``bnb.nn.Linear4bit``, too."""
    layer.__class__ = ADOPTED[type(layer)]
    assert isinstance(layer, FromBitsandbytes)
    layer.compute_type_is_set = True
    layer.hide_scales()
