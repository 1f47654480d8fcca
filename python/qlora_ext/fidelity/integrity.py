"""Finds damaged tensors in a 4-bit model: wrong shapes or dtypes, impossible scales, NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..formats import code_values
from ..nn import Packed4bit, TiedLinear4bit, layers_of
from ..weight import Weight4bit

# The largest float16. Weights of real models are far smaller in any dtype.
_LARGEST_SCALE = 65504.0


def problems_of(model: nn.Module) -> list[str]:
    """One sentence for each damaged 4-bit weight of ``model``, and for each other tensor with NaN or infinity."""
    found = [f"{name}: {problem}" for name, layer in layers_of(model) for problem in _of_layer(layer)]
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if not isinstance(t, Weight4bit) and t.is_floating_point() and not t.isfinite().all():
            found.append(f"{name}: has NaN or infinity")
    return found


def _of_layer(layer: Packed4bit) -> Iterator[str]:
    if isinstance(layer, TiedLinear4bit):
        return  # the table is checked
    try:
        layer.check_form()
    except ValueError as error:
        yield str(error)
        return
    for weight in layer.packed_shapes:
        w4 = layer.packed_weight(weight)
        prefix = "" if weight == "weight" else f"{weight}: "
        scales = w4.decoded_scales()
        offsets = w4.decoded_offsets(scales)
        for kind, t in {"scales": scales, "offsets": offsets}.items():
            if t is not None:
                yield from (f"{prefix}{problem}" for problem in _of_values(kind, t))
        nothing = [code for code, value in enumerate(code_values(w4.code)) if not math.isfinite(value)]
        if nothing and (bad := int(torch.isin(w4.packed, w4.packed.new_tensor(nothing)).sum())):
            yield f"{prefix}{bad} of {w4.numel()} codes are NaN or infinite"
        if not scales.any():
            yield f"{prefix}every scale is zero: nothing was loaded into it"


def _of_values(kind: str, values: Tensor) -> Iterator[str]:
    bad = int((~values.isfinite()).sum())
    largest = values.abs().max()
    if bad:
        yield f"{bad} of {values.numel()} {kind} are NaN or infinite"
    elif largest > _LARGEST_SCALE:
        large = int((values.abs() > _LARGEST_SCALE).sum())
        yield (
            f"{large} of {values.numel()} {kind} are above {_LARGEST_SCALE:.0f}, up to {largest:.3g}: "
            "no model has such weights"
        )
