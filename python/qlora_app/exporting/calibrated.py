"""``export --calibrate``: weights that are encoded for the inputs of their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from qlora_ext.form import Form
from qlora_ext.merging.target_format import quantize_joined
from qlora_ext.nn import is_fused_experts
from qlora_ext.weight import Weight4bit

from ..models.adapted import Adapted
from ..quantization import calibrate
from .merging import load, loads_4bit, untie

if TYPE_CHECKING:
    from qlora_ext.calibration import Calibration, LayerReport

# Names of layers. The layers of a group share a factor.
Groups: TypeAlias = "Sequence[Sequence[str]]"


def encode(
    model: Any, groups: Groups, form: Form, calibration: Calibration
) -> tuple[dict[str, Weight4bit], list[LayerReport]]:
    """Encodes weights for the inputs of their layers, block by block.

    Args:
        model: dense. The layers get the decoded weights.
        groups: the linear layers, in the order of the model.
        form: of the weights.

    Returns:
        The weights on the CPU, by the name of the layer, and how each was encoded.
    """
    from qlora_ext.calibration import Calibrator

    layers = {name: model.get_submodule(name) for group in groups for name in group}
    found: dict[str, Weight4bit] = {}

    def keep(name: str, w4: Weight4bit) -> None:
        layers[name].weight.copy_(w4.dequantize(layers[name].weight.dtype))
        found[name] = w4.to("cpu")

    with torch.no_grad():
        calibrator = Calibrator(model, layers, calibration, form, None, on_learnt=keep)
        for group in groups:
            by_recipe = quantize_joined([layers[name].weight.detach() for name in group], form)
            for name, plain in zip(group, by_recipe, strict=True):
                keep(name, calibrator.refine(name, "weight", layers[name].weight.detach(), plain))
        calibrator.finish()
    return found, calibrator.report


def calibrated_weights(
    adapted: Adapted, form: Form, groups: Callable[[Any], Groups], calibration: Calibration | None
) -> dict[str, Weight4bit]:
    """The weights of linear layers, merged with the adapter, as ``encode`` returns them; none without a calibration.

    It prints how the errors of the layers' outputs have changed.

    Args:
        groups: returns the layers of the loaded model whose weights the target encodes anew.
    """
    from qlora_ext.dtypes import computing_dtype
    from qlora_ext.nn import computing_in

    if calibration is None:
        return {}
    model = load(adapted)
    found = groups(model)
    if adapted.adapter is not None:
        untie(model)
        model = model.merge_and_unload().eval()
    elif loads_4bit(adapted):
        model = model.dequantize().eval()
    if not found:
        print("no layer was calibrated: all weights are in the format already, and keep their scales")
        return {}
    with computing_in(model, computing_dtype(adapted.loader.dtype, adapted.loader.device)):
        weights, report = encode(model, found, form, calibration)
    for line in calibrate.summary(report, calibration.distill, "the format's own recipe"):
        print(line)
    if any(is_fused_experts(module) for module in model.modules()):
        print("experts are not calibrated: their scales come from the format's own recipe")
    return weights
