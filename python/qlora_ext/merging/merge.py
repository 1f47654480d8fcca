"""Merges the adapters of a model into its 4-bit weights."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..form import Form
from ..nn import computing_in, is_dense, quantize_model
from .codes import retained_update
from .layers import Over4bit


@dataclasses.dataclass(frozen=True)
class MergeError:
    """The error of quantizing merged weights W + ΔW again, to Q(W + ΔW).

    Attributes:
        by_layer: ‖Q(W + ΔW) - (W + ΔW)‖ / ‖W + ΔW‖ for each layer.
        total: the same over all layers.
        retained: the share of the update that the codes hold, ⟨Q(W + ΔW) - W, ΔW⟩ / ‖ΔW‖² over all layers. Rounding
            errors orthogonal to the update, which average out over a row, do not count.
    """

    by_layer: dict[str, float]
    total: float
    retained: float


def merge_to_4bit(model: Any) -> tuple[nn.Module, MergeError]:
    """Merges the active adapters of a PEFT model into its 4-bit weights, and removes them.

    Returns:
        The base model, still 4-bit, and the error of quantizing the merged weights.

    Example:
        >>> from qlora_ext.integrations.peft import merge_to_4bit
        >>> merged, error = merge_to_4bit(model)
        >>> type(merged.model.layers[0].mlp.up_proj).__name__
        'Linear4bit'
    """
    by_layer: dict[str, float] = {}
    error = norm = retained = total = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, Over4bit):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()  # an adapter on a dense layer, such as the output head
            continue
        if layer.merged_adapters:
            layer.unmerge()
        names = layer.names_to_merge(None)
        if not names:
            continue
        before = layer.decoded()
        exact, bias = layer.merged_weights(names)
        layer.set_merged(exact, bias)
        layer.merged_adapters.clear()
        path = name.removeprefix("base_model.model.")
        if layer.parameter_name != "weight":
            path = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
        after = layer.decoded()
        part, update = retained_update(exact - before, before, after)
        retained, total = retained + part, total + update
        difference = (after - exact).norm().item() ** 2
        size = exact.norm().item() ** 2
        by_layer[path] = (difference / size) ** 0.5 if size else 0.0
        error, norm = error + difference, norm + size
    base = model.unload()
    return base, MergeError(by_layer, (error / norm) ** 0.5 if norm else 0.0, retained / total if total else 1.0)


def merge_calibrated(model: Any, calibration: Any, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Merges the active adapters of a PEFT model, and quantizes the merged weights with a calibration.

    ``merge_to_4bit`` keeps the scales and rounds stochastically. This function chooses scales and codes that minimize
    the error of the outputs on the calibration's tokens. It is better for large updates, and worse for updates far
    below the distance between two codes.

    Args:
        calibration: as in ``quantize_model``.
        compute_dtype: the dtype in which the model runs on the calibration's tokens; the default is its own.

    Returns:
        The base model, still 4-bit. ``calibration_of`` reports the result for each layer. Layers without an adapter
        keep their bits.

    Raises:
        ValueError: no adapter is active on a 4-bit layer, or the layers differ in form, compute dtype or activations.

    Example:
        >>> from qlora_ext.integrations.peft import merge_calibrated
        >>> merged = merge_calibrated(model, torch.randint(0, 128, (4, 32)))
        >>> len(qlora_ext.calibration.calibration_of(merged))
        14
    """
    forms: dict[str, tuple[Form, torch.dtype, str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Over4bit) and (layer.merged_adapters or layer.names_to_merge(None)):
            forms[name.removeprefix("base_model.model.").replace(".base_layer", "")] = (
                layer.layer4bit.form,
                layer.layer4bit.compute_dtype,
                layer.layer4bit.activations,
            )
    if not forms:
        raise ValueError("model: expected an active adapter on a 4-bit layer, found none")
    form, dtype, activations = first = next(iter(forms.values()))
    if any(other != first for other in forms.values()):
        raise ValueError(
            f"model: expected adapters on layers of the same form, got {sorted({*map(str, forms.values())})}"
        )
    base: nn.Module = model.base_model.merge_into_dense()  # merge_and_unload would also decode the other layers
    others = [name for name, module in base.named_modules() if is_dense(module) and name not in forms]
    with contextlib.nullcontext() if compute_dtype is None else computing_in(base, compute_dtype):
        return quantize_model(
            base,
            skip=others,
            towers=True,
            calibration=calibration,
            compute_dtype=dtype,
            activations=activations,
            **form.keywords,
        )
