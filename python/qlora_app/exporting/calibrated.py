"""``export --calibrate``: weights that are encoded for the inputs of their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from qlora_ext.form import Form
from qlora_ext.nn import is_fused_experts
from qlora_ext.weight import Weight4bit, quantize

from ..models.adapted import Adapted
from ..models.loading import load_dense
from ..models.pretrained import has_4bit_blocks, is_4bit
from ..quantization import calibrate
from .tying import untie

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
    with torch.no_grad():
        calibrator = Calibrator(model, layers, calibration, form, None)
        for group in groups:
            for name, plain in _by_recipe({name: layers[name] for name in group}, form).items():
                weight = layers[name].weight
                w4 = calibrator.refine(name, "weight", weight.detach(), plain)
                weight.copy_(w4.dequantize(weight.dtype))
                found[name] = w4.to("cpu")
        calibrator.finish()
    return found, calibrator.report


def _by_recipe(group: dict[str, nn.Linear], form: Form) -> dict[str, Weight4bit]:
    """The weights of layers of the same width by the form's recipe, which may compute a factor for all of them."""
    from qlora_ext.checkpoints import select_rows

    weights = [layer.weight.detach() for layer in group.values()]
    joined = quantize(torch.cat(weights), form)
    if len(weights) == 1:
        return dict.fromkeys(group, joined)
    parts = torch.arange(len(joined.packed), dtype=torch.int64, device=joined.device).split([len(w) for w in weights])
    return {name: select_rows(joined, part) for name, part in zip(group, parts, strict=True)}


class CalibratedWeights:
    """The weights that ``--calibrate`` encodes: those of linear layers, merged with the adapter.

    Args:
        adapted: the model.
        form: of the weights.
        groups: returns the layers of the loaded model whose weights the target encodes anew.

    Attributes:
        weights: as ``encode`` returns them; empty until ``compute``.
    """

    def __init__(self, adapted: Adapted, form: Form, groups: Callable[[Any], Groups]) -> None:
        self.adapted, self._form, self._groups = adapted, form, groups
        self.weights: dict[str, Weight4bit] = {}

    def compute(self, calibration: Calibration) -> None:
        """Encodes the weights, and prints how the errors of the layers' outputs have changed."""
        from qlora_ext.dtypes import computing_dtype
        from qlora_ext.nn import computing_in

        model, groups = self._merged()
        if not groups:
            print("no layer was calibrated: all weights are in the format already, and keep their scales")
            return
        loader = self.adapted.loader
        with computing_in(model, computing_dtype(loader.dtype, loader.device)):
            self.weights, report = encode(model, groups, self._form, calibration)
        for line in calibrate.summary(report, "the format's own recipe"):
            print(line)
        if any(is_fused_experts(module) for module in model.modules()):
            print("experts are not calibrated: their scales come from the format's own recipe")

    def _merged(self) -> tuple[Any, Groups]:
        """The dense model with the adapter merged into it, and its layers to encode."""
        adapted = self.adapted
        if adapted.adapter is None and not is_4bit(adapted.source) and not has_4bit_blocks(adapted.source):
            model = load_dense(adapted.source, adapted.loader.dtype, adapted.loader.device)
            return model, self._groups(model)
        model = adapted.load()
        groups = self._groups(model)
        if adapted.adapter is None:
            return model.dequantize().eval(), groups
        untie(model)
        return model.merge_and_unload().eval(), groups
