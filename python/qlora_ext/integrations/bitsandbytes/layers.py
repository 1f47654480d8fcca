"""Linear layers that are instances of both our classes and bitsandbytes', and compute with our operators."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from ...nn import SCALES, Linear4bit
from ...weight import Weight4bit


class FromBitsandbytes(Linear4bit):
    """A mixin for our layers that replace one of bitsandbytes'."""

    # If False, the first input determines the compute dtype, as in bitsandbytes.
    compute_type_is_set: bool

    def become(self, w4: Weight4bit, compute_dtype: torch.dtype | None) -> None:
        """Initializes this object, whose class was ``bnb.nn.Linear4bit`` until now, as one of our layers.

        Args:
            w4: its weight.
            compute_dtype: None for the dtype of the first input.
        """
        for attribute in ("compute_dtype", "quant_state", "quant_storage"):
            vars(self).pop(attribute, None)
        self._set_form(w4.form, compute_dtype or w4.dtype)
        self._register_packed("meta")
        self.set_weight(w4)
        self.compute_type_is_set = compute_dtype is not None

    @property
    def quant_state(self) -> QuantState | None:
        """The scales as bitsandbytes' ``QuantState``, which shares this layer's memory; None on the meta device.

        bitsandbytes' functions take it together with ``weight.packed.reshape(-1, 1)``.
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
                w4 = Weight4bit.from_bitsandbytes(state_dict, weight)
                expected = self.packed_shapes["weight"]
                if tuple(w4.shape) != expected:
                    raise ValueError(f"{weight}: expected shape {list(expected)}, got {list(w4.shape)}")
                if w4.code != self.form.code:
                    raise ValueError(f"{weight}: expected {self.form.code.upper()} codes, got {w4.code.upper()}")
            except (KeyError, ValueError) as error:  # an error even with strict=False
                args[-1].append(error.args[0])
                return
            others = {key: t for key, t in state_dict.items() if not key.startswith(f"{weight}.")}
            tensors = {"weight": w4.packed, **{scale: getattr(w4, scale) for scale in SCALES}}
            state_dict = others | {prefix + name: t for name, t in tensors.items() if t is not None}
            self.weight_dtype = w4.dtype
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fused_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.compute_type_is_set:
            self.compute_dtype, self.compute_type_is_set = x.dtype, True
        return super().fused_forward(x, *args, **kwargs)


class AdoptedLinear4bit(FromBitsandbytes, bnb.nn.Linear4bit):
    """Our ``Linear4bit`` as a subclass of ``bnb.nn.Linear4bit``, so that scripts that look for that class find it.

    Its weight is a ``Weight4bit`` [N, K] as in all our layers, not bitsandbytes' ``Params4bit``. The ``quant_state`` is
    an attribute of the layer, not of the weight, and ``dequantize()`` returns the decoded weight. The layer loads
    states in bitsandbytes' format and in ours; ``state_dict()`` returns ours.
    """


# For each of our layer classes, the subclass that replaces bitsandbytes' layers.
ADOPTED: dict[type[Linear4bit], type[FromBitsandbytes]] = {Linear4bit: AdoptedLinear4bit}


def look_like_linear4bit(layer: Linear4bit) -> None:
    """Changes the class of one of our layers, in place, to one that is also a ``bnb.nn.Linear4bit``."""
    layer.__class__ = ADOPTED[type(layer)]
    assert isinstance(layer, FromBitsandbytes)
    layer.compute_type_is_set = True
